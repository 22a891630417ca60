"""A twin of the user's module without memory: the same classes, names and hooks around tensors without values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.lightning_names import is_a
from lightning_lora.planning.codes import bytes_of_codes, stand_in_for_codes
from lightning_lora.planning.weightless import WeightlessTensor
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import find_record


def meta_twin(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``module`` on the meta device, with its ties, flags and hooks; quantized layers become stand-ins.

    Args:
        module: Any module, on any device. Left as it is.
        dtype: Of the floating-point parameters and buffers of the base; None: their own.

    Raises:
        UnsupportedSetupError: If a parameter is stored in another form than dense floating-point numbers.
    """
    memo: dict[int, Any] = {id(trainer): None for trainer in _trainers(module)}
    memo.update({id(tensor): tensor for tensor in _remembered(module)})
    coded = {name: child for name, child in module.named_modules() if isinstance(child, QuantizedLayer)}
    codes = {id(child.weight) for child in coded.values()}
    adapters = {id(p) for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()}
    tensors = _Converter(lambda tensor: _on_meta(tensor, None if id(tensor) in adapters else dtype))
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in codes:
            _refuse_codes(name, tensor)
        memo[id(tensor)] = tensors(tensor)
    twin = copy.deepcopy(module, memo)
    stand_in_for_codes(twin, {name: bytes_of_codes(child) for name, child in coded.items()})
    return twin


def become_weightless(twin: nn.Module) -> None:
    """Give a module on the meta device tensors that say they are on the CPU, in place.

    Metrics of torchmetrics measure nothing any more: most look at values, and none is part of the loss.
    """
    tensors = _Converter(WeightlessTensor)
    for child in twin.modules():
        for store in (child._parameters, child._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = tensors(tensor)
        for kind, score in (("Metric", _no_score), ("MetricCollection", _no_scores)):
            if is_a(child, kind):
                child.__dict__.update(dict.fromkeys(("forward", "update", "compute"), score))


class _Converter:
    """Converts each tensor once, so that what was shared stays shared."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        self._convert = convert
        self._done: dict[int, tuple[Tensor, Tensor]] = {}  # the first holds the tensor, and so its id

    def __call__(self, tensor: Tensor) -> Any:
        if id(tensor) not in self._done:
            with torch.no_grad():
                converted = self._convert(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                converted = nn.Parameter(converted, requires_grad=tensor.requires_grad)
                # What transformers loaded has a mark, by which a new head is told from it.
                if hasattr(tensor, "_is_hf_initialized"):
                    converted._is_hf_initialized = tensor._is_hf_initialized  # type: ignore[attr-defined]
            self._done[id(tensor)] = tensor, converted
        return self._done[id(tensor)][1]


def _on_meta(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")


def _refuse_codes(name: str, tensor: Tensor) -> None:
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    if not dense or type(tensor).__name__ in ("Params4bit", "Int8Params"):
        raise UnsupportedSetupError(
            f"plan_memory: {name!r} is stored as {type(tensor).__name__} {tensor.layout}. Pass the dense module, its "
            "config or its name, and the format by quantization=QuantizationConfig(...)."
        )


def _no_score(*_: Any, **__: Any) -> Tensor:
    return torch.zeros(())


def _no_scores(*_: Any, **__: Any) -> dict[str, Tensor]:
    return {}


def _remembered(module: nn.Module) -> list[Tensor]:
    """Values that an injection keeps to undo itself: no part of a step, and not copied for it."""
    records = [record for child in module.modules() if (record := find_record(child)) is not None]
    return [tensor for record in records for kept in (record.originals, record.buffers) for tensor in kept.values()]


def _trainers(module: nn.Module) -> list[Any]:
    """What a LightningModule refers to and a copy must not take along: the trainer holds data and callbacks."""
    found = [vars(child).get(name) for child in module.modules() for name in ("_trainer", "_fabric")]
    return [item for item in found if item is not None]
