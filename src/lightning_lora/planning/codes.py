"""What quantization stores: bytes of a layer's codes and constants, and a stand-in that computes as such a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.class_swap import restore_class, swap_class
from lightning_lora.layers import AdaptedLayer, AdaptedQuantized
from lightning_lora.quantization.config import BITS, COMPUTE_DTYPES, STORAGE_DTYPES, QuantizationConfig
from lightning_lora.quantization.product import product
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.targets.selection import Selection

_NESTED_BLOCK = 256  # bitsandbytes quantizes the constants in blocks of this many


def code_bytes(numel: int, config: QuantizationConfig) -> int:
    """Bytes of the codes of a weight with ``numel`` values."""
    if BITS[config.quant_type] != 4:
        return numel * BITS[config.quant_type] // 8
    width = STORAGE_DTYPES[config.storage_dtype].itemsize
    return math.ceil(math.ceil(numel / 2) / width) * width


def constant_bytes(out_features: int, in_features: int, config: QuantizationConfig) -> int:
    """Bytes of what belongs to the codes of one weight: scales, tables of the format, and the offset of nested scales.

    ``"int8"`` has one fp32 scale a row. 4-bit types have one a block, and the 16 values of the codes as bitsandbytes
    keeps them beside every weight; with double quantization one byte a block, one fp32 a 256 blocks, the 256 values of
    8-bit codes, and an offset (QLoRA, arXiv:2305.14314, section 3).
    """
    if BITS[config.quant_type] != 4:
        return 4 * out_features if config.quant_type == "int8" else 0
    blocks = math.ceil(out_features * in_features / config.block_size)
    scales = blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) if config.double_quant else 4 * blocks
    return scales + _table_bytes(config.double_quant)


def _table_bytes(double: bool) -> int:
    return 4 * 16 + (4 * 256 + 4 if double else 0)


class CodedLinear(nn.Linear):
    """An ``nn.Linear`` that computes, and takes memory for a moment, as one whose weight is stored as codes.

    Its ``weight`` is dense and there for its shape only.

    Attributes:
        stored_bytes: What it takes instead: bytes of the codes and of the constants.
        compute_dtype: As in :class:`~lightning_lora.quantized_layer.QuantizedLayer`.
        holds: As there; its ``weight`` has that dtype.
        note: Told of each dense weight that is there for a moment.
    """

    stored_bytes: tuple[int, int]
    compute_dtype: torch.dtype | None
    holds: torch.dtype | None
    note: Callable[[Tensor], Tensor]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A dense weight ``(out_features, in_features)`` without values."""
        if dtype == self.holds:
            return self.weight.detach()
        dense = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        return self.note(dense)

    def describe(self) -> str:
        """For messages."""
        return "codes"

    @override
    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        return product(input, layer)


def _unnoted(dense: Tensor) -> Tensor:
    return dense


def store_as_codes(module: nn.Module, selection: Selection, config: QuantizationConfig) -> dict[str, str]:
    """Make linear layers of ``module`` stand-ins of quantized ones, in place; adapters stay.

    Args:
        module: On the meta device, with its adapters.
        selection: The layers that would be quantized, were they all frozen.
        config: The format.

    Returns:
        Linear layers that stay dense: name -> reason.
    """
    kept = dict(selection.skipped)
    for target in selection.targets:
        layer: Any = module.get_submodule(target.name)
        if layer.weight.requires_grad:
            kept[target.name] = "trained in full (modules_to_save)"
        else:
            shape = (layer.out_features, layer.in_features)
            stored = code_bytes(math.prod(shape), config), constant_bytes(*shape, config)
            compute_dtype = None if config.compute_dtype is None else COMPUTE_DTYPES[config.compute_dtype]
            holds = torch.bfloat16 if config.quant_type == "bf16" else None
            _become_coded(layer, stored, compute_dtype, holds)
    return kept


def stand_in_for_codes(module: nn.Module, stored: dict[str, tuple[int, int]]) -> None:
    """Make the quantized layers of a twin stand-ins, in place; what they are called tells their ``stored_bytes``."""
    for name, size in stored.items():
        layer: Any = module.get_submodule(name)
        shape = (layer.out_features, layer.in_features)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=layer.dense_dtype, device="meta"), requires_grad=False)
        _become_coded(layer, size, layer.compute_dtype, layer.holds)


def bytes_of_codes(layer: QuantizedLayer) -> tuple[int, int]:
    """Bytes of the codes and of the constants that a quantized layer really has."""
    constants = layer.constants()
    tables = _table_bytes("weight.nested_absmax" in constants) if "weight.absmax" in constants else 0
    return layer.weight.nbytes, sum(tensor.nbytes for tensor in constants.values()) + tables


def _become_coded(
    layer: Any, stored: tuple[int, int], compute_dtype: torch.dtype | None, holds: torch.dtype | None
) -> None:
    adapted = isinstance(layer, AdaptedLayer)
    if adapted:
        restore_class(layer)
    layer.__class__ = CodedLinear
    if holds is not None:
        layer.weight.data = layer.weight.data.to(holds)
    layer.__dict__.update(compute_dtype=compute_dtype, holds=holds, stored_bytes=stored, note=_unnoted)
    if adapted:
        swap_class(layer, AdaptedQuantized)


def coded_layers(module: nn.Module) -> list[CodedLinear]:
    """All stand-ins inside ``module``, adapted or not."""
    return [child for child in module.modules() if isinstance(child, CodedLinear)]
