"""The weights that a merge makes, layer by layer, and the proof that they are right: nothing is changed for it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_lora.class_swap import original_class
from lightning_lora.errors import MergeError
from lightning_lora.kept_weights import KeptWeight, replace_codes, replace_weight
from lightning_lora.layers import AdaptedLayer, adapted_layers
from lightning_lora.merging.bases import Layer, live_weight, original_weights
from lightning_lora.merging.block_sum import fold_and_measure, fold_in
from lightning_lora.merging.config import MergeConfig
from lightning_lora.merging.report import MergeReport, Norms
from lightning_lora.quantization.conversion import settings_of
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import Record, find_record
from lightning_lora.sample import agree, rounding


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

    def put_in(self) -> KeptWeight:
        """Give the layer, whose adapters were taken off, the merged weight, and return what it had."""
        return replace_weight(self.layer, self.dense) if self.codes is None else replace_codes(self.layer, self.codes)


def merged_weights(module: nn.Module, config: MergeConfig, norms: Norms | None = None) -> Iterator[MergedWeight]:
    """Layer by layer, the merged weight in ``config.dtype`` or the base's own.

    Raises:
        MergeError: If original weights can't be read or, where ``norms`` are taken, a merged weight is not finite.
    """
    base_of = _base_reader(module, config)
    for name, layer in list(adapted_layers(module)):
        base, dtype, adapters = base_of(name, layer), config.torch_dtype or layer.weight_dtype, layer.active_adapters
        codes = dequantized = None
        if config.base == "requantized" and isinstance(layer, QuantizedLayer):
            codes = layer.codes_of(fold_in(adapters, base, torch.promote_types(torch.float32, base.dtype)))
            dequantized = KeptWeight(codes, _format_of(layer)).matrix_for(layer)
        if norms is None:
            dense = fold_in(adapters, base, dtype) if dequantized is None else dequantized.to(dtype)
        else:
            folded = fold_and_measure(adapters, base, dtype, instead=dequantized)
            norms.add(name, folded, shift=_shift(name, layer, base) if config.base == "original" else 0.0)
            if not folded.is_finite:
                raise MergeError(
                    f"The merged weight of {name!r} is not finite: its adapter diverged, or overflows {dtype}. "
                    "Merge an earlier checkpoint, or in a wider dtype."
                )
            dense = folded.stored
            del folded
        yield MergedWeight(name, layer, dense, codes)
        del base, dense, codes, dequantized  # else a layer more is there while the next is folded


def _shift(name: str, layer: AdaptedLayer, base: Tensor) -> float:
    return float(torch.linalg.vector_norm(live_weight(name, layer).to(base.dtype).sub(base)))


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
    live_record(module)
    norms = Norms()
    deque(proved_weights(module, config, norms), maxlen=0)  # keeps none of them
    if config.base == "original":
        for _ in plain_weights(module, config):  # read and compared now: what is to be written must be there
            pass
    return judge(norms, config)


def proved_weights(module: nn.Module, config: MergeConfig, norms: Norms) -> Iterator[MergedWeight]:
    """:func:`merged_weights`, with what a layer's own forward makes of each compared with live adapters."""
    for weight in merged_weights(module, config, norms):
        if weight.layer.has_own_forward:
            _probe(weight.name, weight.layer, config.tolerance)
        yield weight
        del weight


def judge(norms: Norms, config: MergeConfig) -> MergeReport:
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
    cls = original_class(layer).__name__
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


def live_record(module: nn.Module) -> Record:
    """The record of a module whose adapters can be merged.

    Raises:
        MergeError: If it has none, or they are merged.
    """
    record = find_record(module)
    if record is None:
        raise MergeError("The module has no adapters to merge.")
    if record.merged is not None:
        raise MergeError("The adapters of this module are merged already.")
    return record
