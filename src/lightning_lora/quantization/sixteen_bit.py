"""Frozen weights in bf16, whatever dtype the rest of the module has.

bf16 autocast rounds a weight to bf16 for every product: where it is stored so, a step computes the same numbers from
half the memory, and casts nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import QuantizationError
from lightning_lora.quantization.product import product
from lightning_lora.quantized_layer import QuantizedLayer


class QuantizedLinear16bit(QuantizedLayer, nn.Linear):
    """A frozen linear layer in 16 bits. ``weight`` is ``(out_features, in_features)``, bf16."""

    weight: nn.Parameter
    parameter_class = nn.Parameter
    holds = torch.bfloat16

    @override
    def forward(self, input: Tensor) -> Tensor:
        return product(input, self)

    @override
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.weight.requires_grad:  # which codes of integers refuse by themselves
            raise QuantizationError(
                "A weight that is stored in bf16 was set to require gradients, and would get none. Train the layer in "
                "full with modules_to_save, or leave it dense with QuantizationConfig.skip_modules."
            )
        return self.weight.detach().to(dtype)

    @override
    def codes_of(self, weight: Tensor) -> nn.Parameter:
        return quantize(weight.to(self.weight.device))

    @override
    def constants(self) -> dict[str, Tensor]:
        return {}

    @override
    def code_keys(self) -> tuple[str, ...]:
        return ()

    @override
    def describe(self) -> str:
        return "bf16"

    @override
    def _move_constants(self, device: torch.device) -> None:
        pass

    @override
    def _is_own(self, key: str) -> bool:
        return key == "weight"

    @override
    def _take(self, saved: dict[str, Tensor]) -> list[str]:
        found, shape = saved["weight"].detach(), (self.out_features, self.in_features)
        if tuple(found.shape) != shape:
            return [f"{tuple(found.shape)} in the file and {shape} here"]
        if not found.is_floating_point():
            return [f"{found.dtype} in the file and bf16 here"]
        self.requantize(found)
        return []


def quantize(weight: Tensor) -> nn.Parameter:
    """A dense weight ``(out_features, in_features)``, rounded to bf16.

    Raises:
        QuantizationError: If a value is not finite, or too large for bf16.
    """
    rounded: Any = weight.detach().to(torch.bfloat16, copy=True)
    if rounded.numel() and not torch.isfinite(torch.stack(torch.aminmax(rounded))).all():
        raise QuantizationError("its weight holds values that are not finite in bf16")
    return nn.Parameter(rounded, requires_grad=False)
