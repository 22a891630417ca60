"""Fold adapters into the base, in fp32, with proof; and take them out again exactly.

An unmerge by subtraction is not exact (4 % of fp32 elements and more of bf16 ones change), so the replaced weights are
kept.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import MergeError
from lightning_lora.frozen import keep_base_as_is
from lightning_lora.injection import thaw
from lightning_lora.layers import AdaptedLayer, adapted_layers, attach_adapter, detach_adapters
from lightning_lora.record import MergedState, Record, find_record
from lightning_lora.targets.patterns import canonical

if TYPE_CHECKING:
    from rich.console import Group

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
        tolerance: Refuse a merge whose rounding error, over all layers, exceeds this share of the update.

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


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one layer.

    Attributes:
        name: Dotted name.
        update: Frobenius norm of the update ``scaling * B A``.
        weight: Frobenius norm of the base weight.
        error: ``|merged - base - update| / |update|``: what rounding to the weight's dtype costs.
    """

    name: str
    update: float
    weight: float
    error: float


@dataclass(frozen=True)
class OutputDifference:
    """Outputs of the merged module against those with live adapters, on one batch.

    Attributes:
        max_abs: Largest absolute difference of any element.
        relative: Norm of the difference over the norm of what the adapters change in the output.
    """

    max_abs: float
    relative: float


@dataclass(frozen=True)
class MergeReport:
    """Proof of a merge.

    Attributes:
        layers: One entry per merged layer.
        relative_error: Error over all layers, in units of the update.
        source: ``"last"`` or ``"best"``.
        dtype: Dtype of the merged weights.
        output_difference: None where no batch had been seen.
        folder: Where the artifact is, if one was written.
    """

    layers: tuple[MergedLayer, ...]
    relative_error: float
    source: str = "last"
    dtype: str = "float32"
    output_difference: OutputDifference | None = None
    folder: str | None = None

    @property
    def max_relative_error(self) -> float:
        """The largest error of a layer, in units of its update."""
        return max((layer.error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {
            **dataclasses.asdict(self),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "max_relative_error": self.max_relative_error,
        }

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"merged {self.source} adapters ({self.dtype})", title_justify="left")
        table.add_column("layer", overflow="fold")
        for header in ("|update|", "|update|/|weight|", "error/|update|"):
            table.add_column(header, justify="right", no_wrap=True)
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:8]
        for layer in worst:
            share = layer.update / layer.weight if layer.weight else math.inf
            table.add_row(layer.name, f"{layer.update:.3g}", f"{share:.2%}", f"{layer.error:.1e}")
        lines = [
            f"{len(self.layers)} layers, worst first; error over all layers {self.relative_error:.1e} of the update"
        ]
        if self.output_difference is not None:
            difference = self.output_difference
            lines.append(
                f"outputs on a batch: largest difference {difference.max_abs:.1e}, "
                f"{difference.relative:.1e} of what the adapters change"
            )
        if self.folder is not None:
            lines.append(f"written to {self.folder}")
        return Group(table, *lines)


@dataclass
class _Norms:
    """Sums of squares over layers, in units that add up."""

    error: float = 0.0
    update: float = 0.0
    layers: list[MergedLayer] = field(default_factory=list)

    def add(self, name: str, layer: AdaptedLayer, update: Tensor, stored: Tensor) -> None:
        base = layer.weight_matrix().detach().to(update.dtype)
        # The difference of two close floating-point numbers is exact (Sterbenz), so fp32 shows the rounding of fp32.
        error = torch.linalg.vector_norm((stored.to(update.dtype) - base).sub_(update)).item()
        size = torch.linalg.vector_norm(update).item()
        self.error += error**2
        self.update += size**2
        weight = torch.linalg.vector_norm(base).item()
        self.layers.append(MergedLayer(name, size, weight, error / size if size else 0.0))

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.update) if self.update else 0.0


def merged_matrices(
    module: nn.Module, norms: _Norms | None = None, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, AdaptedLayer, Tensor]]:
    """Layer by layer: name, layer, merged weight ``(out_features, in_features)`` in ``dtype`` or the base's own.

    Raises:
        MergeError: If a merged weight is not finite.
    """
    for name, layer in list(adapted_layers(module)):
        update = layer.weight_update()
        stored = (layer.weight_matrix().detach().to(update.dtype) + update).to(dtype or layer.weight.dtype)
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
        MergeError: If the error exceeds ``config.tolerance``, a weight is not finite, or nothing is adapted.
    """
    _live_record(module)
    dtype = DTYPES[config.dtype] if config.dtype else None
    norms, dtypes = _Norms(), set()
    for _, _, stored in merged_matrices(module, norms, dtype=dtype):
        dtypes.add(str(stored.dtype).removeprefix("torch."))
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
        merged.weights[name] = layer.weight.data
        merged.active[name] = layer.active
        layer.weight.data = layer.as_weight(stored)
        merged.adapters[name] = detach_adapters(layer)
    thaw(module, record)
    record.merged = merged
    return report


def unmerge_adapters(module: nn.Module) -> None:
    """Undo :func:`merge_adapters` exactly: the base weights bit by bit, and live adapters.

    Raises:
        MergeError: If the module is not merged, or is a copy of a merged module, which has no way back.
    """
    record = find_record(module)
    if record is None or record.merged is None:
        raise MergeError("The module is not merged.")
    merged = record.merged
    if merged.weights is None:
        raise MergeError(
            "This module is a copy of a merged one and has no base weights to go back to. "
            "Build the module anew, or call remove_adapters(module) to take its merged weights as a new base."
        )
    layers = {canonical(name): child for name, child in module.named_modules()}
    for name, weight in merged.weights.items():
        layer = attach_adapter(layers[canonical(name)], next(iter(merged.adapters[name])))
        layer.weight.data = weight.to(device=layer.weight.device, dtype=layer.weight.dtype)
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
