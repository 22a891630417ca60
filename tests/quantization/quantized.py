"""Quantized layers to look at, and what their codes are, bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import QuantizationConfig
from lightning_lora.quantization.conversion import quantize_layers
from lightning_lora.quantized_layer import QuantizedLayer

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4-double": {"quant_type": "nf4", "double_quant": True},
    "fp4": {"quant_type": "fp4"},
    "fp4-double": {"quant_type": "fp4", "double_quant": True},
    "int8": {"quant_type": "int8"},
    "bf16": {"quant_type": "bf16"},
}
FOUR_BIT = [name for name in FORMATS if name not in ("int8", "bf16")]
STORAGES = ("uint8", "float32", "bfloat16", "float16")
# What one rounding to the dtype of the product may change, relative to the size of the product's terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def dense(out: int = 8, inner: int = 64, *, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(inner, out, bias=bias).to(dtype)


def quantized(form: str, out: int = 8, inner: int = 64, *, layer: nn.Linear | None = None, **options: Any) -> Any:
    """A linear layer in one of :data:`FORMATS`; options are of the layer or of the config."""
    of_layer = {key: options.pop(key) for key in ("dtype", "bias") if key in options}
    holder = nn.Sequential(dense(out, inner, **of_layer) if layer is None else layer)
    quantize_layers(holder, ["0"], QuantizationConfig(**{**FORMATS[form], **options}))
    return holder[0]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return drawn.requires_grad_(grad)


def codes_of(module: nn.Module) -> dict[str, Tensor]:
    """The bytes of all codes and scales inside a module: floating-point storage may hold NaNs."""
    found: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLayer):
            for key, value in {"weight": layer.weight, **layer.constants()}.items():
                found[f"{name}.{key}"] = value.detach().clone().contiguous().view(-1).view(torch.uint8)
    return found


def equal_codes(a: nn.Module, b: nn.Module) -> bool:
    first, second = codes_of(a), codes_of(b)
    return bool(first) and first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
