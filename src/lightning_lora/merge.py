"""Fold adapters into the base, in fp32, with proof; and take them out again exactly.

An unmerge by subtraction is not exact (4 % of fp32 elements and more of bf16 ones change), so the replaced weights are
kept.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_lora.class_swap import original_class
from lightning_lora.dense_models import declare_dense
from lightning_lora.errors import MergeError
from lightning_lora.frozen import keep_base_as_is
from lightning_lora.injection import thaw
from lightning_lora.kept_weights import KeptWeight, put_back, replace_codes, replace_weight, snapshot
from lightning_lora.layers import AdaptedLayer, adapted_layers, attach_adapter, detach_adapters, note_siblings
from lightning_lora.merge_bases import Layer, live_weight, original_weights
from lightning_lora.merge_changes import base_sums, changed_since_merge, weight_of
from lightning_lora.merge_config import MergeConfig
from lightning_lora.merge_report import MergeReport, Norms
from lightning_lora.quantization.conversion import settings_of
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import MergedState, Record, find_record
from lightning_lora.sample import agree, rounding
from lightning_lora.targets.patterns import canonical


class MergedWeight(NamedTuple):
    """One layer with its adapters folded in.

    Attributes:
        name: Dotted name.
        layer: The layer, still with live adapters.
        dense: The merged weight, ``(out_features, in_features)``, as it is written.
        codes: The same as codes of a quantized layer, where the config asks for that.
    """

    name: str
    layer: AdaptedLayer
    dense: Tensor
    codes: Tensor | None


def merged_weights(module: nn.Module, config: MergeConfig, norms: Norms | None = None) -> Iterator[MergedWeight]:
    """Layer by layer, the merged weight in ``config.dtype`` or the base's own.

    Raises:
        MergeError: If original weights can't be read or, where ``norms`` are taken, a merged weight is not finite.
    """
    base_of = _base_reader(module, config)
    for name, layer in list(adapted_layers(module)):
        update = layer.weight_update()
        base = base_of(name, layer).to(update.dtype)
        merged, codes = base + update, None
        if config.base == "requantized" and isinstance(layer, QuantizedLayer):
            codes = layer.codes_of(merged)
            merged = KeptWeight(codes, _format_of(layer)).matrix_for(layer)
        stored = merged.to(config.torch_dtype or layer.weight_dtype)
        if norms is not None:
            shift = base - live_weight(name, layer).to(update.dtype) if config.base == "original" else None
            if not norms.add(name, base=base, update=update, stored=stored, shift=shift):
                raise MergeError(
                    f"The merged weight of {name!r} is not finite: its adapter diverged, or overflows {stored.dtype}. "
                    "Merge an earlier checkpoint, or in a wider dtype."
                )
        yield MergedWeight(name, layer, stored, codes)


def _format_of(layer: AdaptedLayer) -> tuple[type[QuantizedLayer], dict[str, Any]]:
    return cast("type[QuantizedLayer]", original_class(layer)), settings_of(layer)


def plain_weights(module: nn.Module, config: MergeConfig) -> Iterator[tuple[str, QuantizedLayer, Tensor]]:
    """Name, layer and dense weight of the quantized layers without adapters, which a plain module has dense, too."""
    base_of = _base_reader(module, config)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantizedLayer) and not isinstance(layer, AdaptedLayer):
            yield name, layer, base_of(name, layer).to(config.torch_dtype or layer.dense_dtype)


def _base_reader(module: nn.Module, config: MergeConfig) -> Callable[[str, Layer], Tensor]:
    return original_weights(module, config.original) if config.base == "original" else live_weight


def measure_merge(module: nn.Module, config: MergeConfig) -> MergeReport:
    """The report of a merge into ``config.dtype``, without changing anything.

    Raises:
        MergeError: If the error exceeds ``config.tolerance``, a weight is not finite, nothing is adapted, or a layer
            does not compute with the merged weight what it computes with live adapters.
    """
    _live_record(module)
    norms = Norms()
    for _ in _proved_weights(module, config, norms):
        pass
    if config.base == "original":
        for _ in plain_weights(module, config):  # read and compared now: what is to be written must be there
            pass
    return _judge(norms, config)


def _proved_weights(module: nn.Module, config: MergeConfig, norms: Norms) -> Iterator[MergedWeight]:
    for weight in merged_weights(module, config, norms):
        if weight.layer.has_own_forward:
            _probe(weight.name, weight.layer, config.tolerance)
        yield weight


def _judge(norms: Norms, config: MergeConfig) -> MergeReport:
    """The report, if the whole merge is within ``config.tolerance``."""
    if not norms.layers:
        raise MergeError("The module has no adapted layer to merge.")
    dtypes = ", ".join(sorted(norms.dtypes))
    if norms.relative_error > config.tolerance:
        lossy, remedy = f"Rounding to {dtypes}", 'dtype="float32"'
        if config.base == "requantized":
            lossy, remedy = "Quantizing the merged weights again", 'base="dequantized"'
        raise MergeError(
            f"{lossy} would lose {norms.relative_error:.0%} of the update (tolerance {config.tolerance:.0%}). "
            f"Use MergeConfig({remedy}), or raise its tolerance. "
            "The adapters and their checkpoints are untouched."
        )
    return MergeReport(
        layers=tuple(norms.layers),
        relative_error=norms.relative_error,
        source=config.source,
        base=config.base,
        dtype=dtypes,
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
        config: Its ``base``, ``original`` and ``tolerance`` apply; the rest concerns the artifact of the callback.

    Returns:
        Per layer, the size of the update and the error that rounding adds, relative to it.

    Raises:
        MergeError: If the result would not be right; nothing is changed then.
    """
    record = _live_record(module)
    config = dataclasses.replace(config or MergeConfig(), dtype=None)
    merged, norms = MergedState(), Norms()
    assert merged.weights is not None
    try:
        for name, layer, stored, codes in _proved_weights(module, config, norms):
            merged.active[name] = layer.active
            merged.adapters[name] = detach_adapters(layer)
            merged.weights[name] = replace_weight(layer, stored) if codes is None else replace_codes(layer, codes)
        report = _judge(norms, config)
        if config.base != "requantized":
            for name, plain, dense in plain_weights(module, config):
                merged.weights[name] = replace_weight(plain, dense)
        merged.sums = base_sums(module, record)
        if config.base != "requantized" and any(kept.quantized for kept in merged.weights.values()):
            merged.redeclare = declare_dense(module)
    except BaseException:
        _take_back(module, merged)
        raise
    record.merged = merged
    thaw(module, record)
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
    stored = {name: snapshot(layers[canonical(name)]) for name in weights if canonical(name) in layers}
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    declared = merged is not None and merged.redeclare is not None
    unmerge_adapters(module)

    def merge_again() -> None:
        assert record is not None
        if merged is not None and declared:
            merged.redeclare = declare_dense(module)
        for name, restore in stored.items():
            layer = layers[canonical(name)]
            if isinstance(layer, AdaptedLayer):
                detach_adapters(layer)
            restore()
        thaw(module, record)
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        record.merged = merged

    return merge_again


def _take_back(module: nn.Module, merged: MergedState) -> None:
    """Make the layers that a merge has reached what they were before it."""
    assert merged.weights is not None
    layers = {canonical(name): child for name, child in module.named_modules()}
    for name, kept in merged.weights.items():
        put_back(layers[canonical(name)], kept)
    for name, adapters in merged.adapters.items():
        layer = attach_adapter(layers[canonical(name)], next(iter(adapters)))
        layer.adapters, layer.active = adapters, merged.active[name]
    note_siblings(module)


def _unfold(module: nn.Module, record: Record, merged: MergedState) -> None:
    _take_back(module, merged)
    for _, layer in adapted_layers(module):  # which may have moved or changed its mode while it was plain
        layer.adapters.to(layer.weight.device).train(layer.training)
    if merged.redeclare is not None:
        merged.redeclare()
        merged.redeclare = None
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
