"""Exchange the weight of a layer for a dense one, and put back exactly what was there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers import host_of
from lightning_lora.quantization.conversion import become_dense, become_quantized, settings_of
from lightning_lora.quantized_layer import QuantizedLayer


@dataclass(frozen=True)
class KeptWeight:
    """What a layer had in the place of a merged weight.

    Attributes:
        weight: The tensor of a dense weight, or the parameter with the codes of a quantized one.
        quantized: Class and settings of a quantized layer.
    """

    weight: Tensor
    quantized: tuple[type[QuantizedLayer], dict[str, Any]] | None = None

    def matrix_for(self, layer: nn.Module) -> Tensor:
        """The dense weight as ``(out_features, in_features)``, for a layer of the class that it was kept from.

        Codes are dequantized to at least fp32.
        """
        if self.quantized is None:
            host = host_of(layer)
            assert host is not None
            return host.as_matrix(self.weight)
        cls, settings = self.quantized
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        become_quantized(twin, cls, self.weight, **settings)
        return twin.dense_weight()


def replace_weight(layer: Any, matrix: Tensor) -> KeptWeight:
    """Give a layer without adapters the dense weight ``matrix``, ``(out_features, in_features)``."""
    if isinstance(layer, QuantizedLayer):
        parameter: Any = nn.Parameter(matrix, requires_grad=False)
        parameter._is_hf_initialized = True  # else transformers' mark says that it was drawn at random
        cls, codes, settings = become_dense(layer, parameter)
        return KeptWeight(codes, (cls, settings))
    host = host_of(layer)
    assert host is not None
    kept = KeptWeight(layer.weight.data)
    layer.weight.data = host.as_weight(matrix)
    return kept


def replace_codes(layer: Any, codes: Tensor) -> KeptWeight:
    """Give a quantized layer without adapters other codes."""
    cls, settings = type(layer), settings_of(layer)
    kept = KeptWeight(layer.weight, (cls, settings))
    layer.weight = codes
    return kept


def snapshot(layer: Any) -> Callable[[], None]:
    """A function that makes a layer without adapters what it is now: the same parameter with the same data."""
    parameter, data, is_quantized = layer.weight, layer.weight.data, isinstance(layer, QuantizedLayer)

    def restore() -> None:
        if isinstance(layer, QuantizedLayer) and not is_quantized:
            become_dense(layer, parameter)
        layer.weight = parameter
        parameter.data = data

    return restore


def put_back(layer: Any, kept: KeptWeight) -> None:
    """Give a layer back what :func:`replace_weight` kept, on the device and in the precision that it has now."""
    if kept.quantized is None:
        layer.weight.data = kept.weight.to(device=layer.weight.device, dtype=layer.weight.dtype)
        return
    cls, settings = kept.quantized
    device = layer.weight.device
    dtype = layer.dense_dtype if isinstance(layer, QuantizedLayer) else layer.weight.dtype
    become_quantized(layer, cls, kept.weight, **{**settings, "dense_dtype": dtype})
    layer.to(device)
