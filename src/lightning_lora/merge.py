"""Fold adapters into the base, in fp32, with proof; and take them out again exactly.

An unmerge by subtraction is not exact (4 % of fp32 elements and more of bf16 ones change), so the replaced weights are
kept.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import MergeError
from lightning_lora.frozen import keep_base_as_is
from lightning_lora.injection import thaw
from lightning_lora.kept_weights import exchange, put_back, replace_weight
from lightning_lora.layers import AdaptedLayer, adapted_layers, attach_adapter, detach_adapters
from lightning_lora.merge_changes import base_sums, changed_since_merge, weight_of
from lightning_lora.merge_report import MergeReport, Norms
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import MergedState, Record, find_record
from lightning_lora.sample import agree, rounding
from lightning_lora.targets.patterns import canonical

SOURCES = ("last", "best")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How the callback merges at fit end.

    Attributes:
        source: ``"last"`` merges the adapters as they are at fit end, ``"best"`` those of the checkpoint that
            ``ModelCheckpoint`` found best.
        output_dir: Folder of the merged artifact; None: ``merged`` in the run's folder. An existing folder is never
            written into: ``merged-v1``, ``merged-v2``, ... is used instead.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` of the written weights; None: the base's own.
        in_place: Whether the live module becomes plain, with merged weights, after the artifact is written.
        tolerance: Refuse a merge whose rounding error, over all layers, exceeds this share of the update, or that
            changes outputs by more than this share of what the adapters change in them (and by more than rounding
            explains): those of the live module in its own dtype, on a batch of the run, and those of every layer whose
            class has a forward of its own.

    Raises:
        ValueError: For a value that has no meaning.
    """

    source: str = "last"
    output_dir: str | None = None
    dtype: str | None = None
    in_place: bool = True
    tolerance: float = 0.3

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {self.source!r}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be None or one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        if self.output_dir is not None and (
            not isinstance(self.output_dir, (str, os.PathLike)) or not str(self.output_dir).strip()
        ):
            raise ValueError(f"output_dir must be None or the path of a folder, got {self.output_dir!r}.")
        if not isinstance(self.in_place, bool):
            raise ValueError(f"in_place must be True or False, got {self.in_place!r}.")
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)) or not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance!r}.")


def merged_matrices(
    module: nn.Module, norms: Norms | None = None, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, AdaptedLayer, Tensor]]:
    """Layer by layer: name, layer, merged weight ``(out_features, in_features)`` in ``dtype`` or the base's own.

    Raises:
        MergeError: If a merged weight is not finite.
    """
    for name, layer in list(adapted_layers(module)):
        update = layer.weight_update()
        stored = (layer.weight_matrix().detach().to(update.dtype) + update).to(dtype or layer.weight_dtype)
        if not torch.isfinite(stored).all():
            raise MergeError(
                f"The merged weight of {name!r} is not finite: its adapter diverged, or overflows {stored.dtype}. "
                "Merge an earlier checkpoint, or in a wider dtype."
            )
        if norms is not None:
            norms.add(name, layer, update, stored)
        yield name, layer, stored


def measure_merge(module: nn.Module, config: MergeConfig) -> MergeReport:
    """The report of a merge into ``config.dtype``, without changing anything.

    Raises:
        MergeError: If the error exceeds ``config.tolerance``, a weight is not finite, nothing is adapted, or a layer
            does not compute with the merged weight what it computes with live adapters.
    """
    _live_record(module)
    dtype = DTYPES[config.dtype] if config.dtype else None
    norms, dtypes = Norms(), set()
    for name, layer, stored in merged_matrices(module, norms, dtype=dtype):
        dtypes.add(str(stored.dtype).removeprefix("torch."))
        if layer.has_own_forward:
            _probe(name, layer, config.tolerance)
    if not norms.layers:
        raise MergeError("The module has no adapted layer to merge.")
    if norms.relative_error > config.tolerance:
        raise MergeError(
            f"Rounding to {', '.join(sorted(dtypes))} would lose {norms.relative_error:.0%} of the update (tolerance "
            f'{config.tolerance:.0%}). Use MergeConfig(dtype="float32"), or raise its tolerance. '
            "The adapters and their checkpoints are untouched."
        )
    return MergeReport(
        layers=tuple(norms.layers),
        relative_error=norms.relative_error,
        source=config.source,
        dtype=", ".join(sorted(dtypes)),
    )


def _probe(name: str, layer: AdaptedLayer, tolerance: float) -> None:
    """Compare a layer that may do something to its weight or output with what a merge would make of it."""
    cls = type(layer).__bases__[1].__name__
    try:
        adapted, merged, base = layer.probe()
        if not torch.isfinite(adapted).all() or not torch.isfinite(base).all():
            raise ValueError("its output for a random input is not finite")
    except Exception as error:  # any class's forward, called as nn.Linear is
        warnings.warn(
            f"The merge of {name!r} is not verified: {cls}.forward gives nothing to compare for one tensor of shape "
            f"(batch, features) ({type(error).__name__}: {error}). Compare the merged module's outputs yourself.",
            stacklevel=2,
        )
        return
    if not agree([merged], [adapted], [base], tolerance=tolerance, eps=rounding([adapted.dtype])):
        raise MergeError(
            f"{name!r} can't be merged: {cls}.forward does not compute with a merged weight what it computes with live "
            "adapters (it scales or normalises its weight or output). Leave the layer out (exclude_modules), or keep "
            "the adapters live: their checkpoints are complete. Nothing was changed."
        )


def merge_adapters(module: nn.Module, config: MergeConfig | None = None) -> MergeReport:
    """Fold the active adapters into the base weights, in place: original classes and keys, one dense weight per layer.

    The sum is taken in fp32 and rounded once to the weight's dtype. The replaced weights are kept on the module, so
    that :func:`unmerge_adapters` is exact.

    Args:
        module: A module with adapters.
        config: Its ``tolerance`` applies; its ``dtype`` and ``output_dir`` concern the artifact of the callback.

    Returns:
        Per layer, the size of the update and the error that rounding adds, relative to it.

    Raises:
        MergeError: If the result would not be right; nothing is changed then.
    """
    record = _live_record(module)
    report = measure_merge(module, dataclasses.replace(config or MergeConfig(), dtype=None))
    merged = MergedState()
    assert merged.weights is not None
    for name, layer, stored in merged_matrices(module):
        merged.active[name] = layer.active
        merged.adapters[name] = detach_adapters(layer)
        merged.weights[name] = replace_weight(layer, stored)
    thaw(module, record)
    merged.sums = base_sums(module, record)
    record.merged = merged
    return report


def unmerge_adapters(module: nn.Module) -> None:
    """Undo :func:`merge_adapters` exactly: the base weights bit by bit, and live adapters.

    Raises:
        MergeError: If the module is not merged, or is a copy of a merged module, which has no way back, or if a merged
            weight was trained, loaded or edited since: unmerging would throw that away.
    """
    record = find_record(module)
    if record is None or record.merged is None:
        raise MergeError("The module is not merged.")
    if record.merged.weights is None:
        raise MergeError(
            "This module is a copy of a merged one and has no base weights to go back to. "
            "Build the module anew, or call remove_adapters(module) to take its merged weights as a new base."
        )
    changed = changed_since_merge(module)
    layers = [name for name in record.merged.weights if weight_of(name) in changed]
    if layers:
        raise MergeError(
            f"The weight of {layers[0]!r} is not the merged one any more: it was trained, loaded or edited after the "
            "merge, and unmerging would throw that away. Call remove_adapters(module) to take the module's weights as "
            "the new base, or build the module anew."
        )
    _unfold(module, record, record.merged)


def unmerge_for_now(module: nn.Module) -> Callable[[], None]:
    """:func:`unmerge_adapters`, and a function that merges again: every bit, flag and gradient is as before then."""
    record = find_record(module)
    merged = None if record is None else record.merged
    weights = {} if merged is None or merged.weights is None else merged.weights
    layers = {canonical(name): child for name, child in module.named_modules()}
    parameters = {name: layers[canonical(name)].weight for name in weights if canonical(name) in layers}
    stored = {name: (parameter, parameter.data) for name, parameter in parameters.items()}
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    unmerge_adapters(module)

    def merge_again() -> None:
        assert record is not None
        for name, (parameter, weight) in stored.items():
            layer = layers[canonical(name)]
            assert isinstance(layer, AdaptedLayer)
            detach_adapters(layer)
            if isinstance(layer, QuantizedLayer):
                exchange(layer, parameter)
            parameter.data = weight
        thaw(module, record)
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        record.merged = merged

    return merge_again


def _unfold(module: nn.Module, record: Record, merged: MergedState) -> None:
    assert merged.weights is not None
    layers = {canonical(name): child for name, child in module.named_modules()}
    for name, kept in merged.weights.items():
        put_back(layers[canonical(name)], kept)
        layer = attach_adapter(layers[canonical(name)], next(iter(merged.adapters[name])))
        layer.adapters = merged.adapters[name].to(layer.weight.device).train(layer.training)
        layer.active = merged.active[name]
    record.merged = None
    _freeze_again(module, record)


def is_merged(module: nn.Module) -> bool:
    """Whether the adapters of ``module`` are merged into its base."""
    record = find_record(module)
    return record is not None and record.merged is not None


def _freeze_again(module: nn.Module, record: Record) -> None:
    for key, parameter in module.named_parameters():
        if canonical(key) in record.was_trainable:
            parameter.requires_grad_(False)
            parameter.grad = None
        elif canonical(key) in record.was_frozen:
            parameter.requires_grad_(True)
    keep_base_as_is(module, saved=record.saved)


def _live_record(module: nn.Module) -> Record:
    record = find_record(module)
    if record is None:
        raise MergeError("The module has no adapters to merge.")
    if record.merged is not None:
        raise MergeError("The adapters of this module are merged already.")
    return record


def unused_folder(path: Path) -> Path:
    """``path``, or the first of ``path-v1``, ``path-v2``, ... where nothing is yet."""
    candidate, version = path, 0
    while candidate.exists():
        version += 1
        candidate = path.with_name(f"{path.name}-v{version}")
    return candidate
