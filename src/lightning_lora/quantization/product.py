"""The product with a frozen weight that is stored as codes: dequantized for a moment, in forward and in backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.errors import QuantizationError
from lightning_lora.fused import product_dtype
from lightning_lora.quantized_layer import QuantizedLayer


def product(input: Tensor, layer: QuantizedLayer) -> Tensor:
    """``input @ W.T + bias`` of a quantized layer, without touching anything of it.

    Args:
        input: ``(..., in_features)``.
        layer: The layer; its ``compute_dtype`` is that of the product.

    Returns:
        ``(..., out_features)``, in the input's dtype; under autocast in that of the product, as ``nn.Linear``.

    Raises:
        QuantizationError: If the input is not of floating point.
    """
    if not input.is_floating_point():
        raise QuantizationError(
            f"A layer in {layer.describe()} got an input of {input.dtype}: the module casts its inputs to the dtype of "
            "the layer's weight, which is that of the codes now. Name the layer in QuantizationConfig.skip_modules."
        )
    kind = input.device.type
    autocast = torch.is_autocast_enabled(kind) and input.dtype != torch.float64  # which autocast leaves alone
    dtype = layer.compute_dtype or product_dtype(input)
    with torch.autocast(kind, enabled=False):
        bias: Any = None if layer.bias is None else layer.bias.to(dtype)
        trains = bias is not None and bias.requires_grad
        inside = None if trains else bias  # of the product, which is rounded once
        output: Tensor = _FrozenProduct.apply(input.to(dtype), layer, inside)  # type: ignore[no-untyped-call]
        output = output + bias if trains else output
    return output if autocast else output.to(input.dtype)


class _FrozenProduct(torch.autograd.Function):
    """``input @ W.T`` that keeps neither the input nor the dense weight: a frozen weight needs no gradient."""

    generate_vmap_rule = True  # torch.func works with it, as with nn.Linear

    @staticmethod
    def forward(input: Tensor, layer: QuantizedLayer, bias: Tensor | None) -> Tensor:
        return F.linear(input, layer.dequantize(input.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantizedLayer, Tensor | None], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        with torch.autocast(grad_output.device.type, enabled=False):
            return grad_output @ ctx.layer.dequantize(grad_output.dtype), None, None
