"""``F.linear`` with a frozen weight, whose derivative is taken by the products that the CPU is fast at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.fused.draw import products_of
from lightning_lora.fused.linear import rows
from lightning_lora.fused.products import TORCH, Products


def frozen_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input weight^T + bias``, as torch computes it, to the last bit.

    Args:
        input: ``(..., in_features)``.
        weight: ``(out_features, in_features)``, in the dtype of the product; does not train.
        bias: ``(out_features,)``; does not train.

    Returns:
        ``(..., out_features)``.
    """
    products = products_of(weight)
    if products is TORCH:
        return F.linear(input, weight, bias)
    output: Tensor = _FrozenLinear.apply(input, weight, bias, products)  # type: ignore[no-untyped-call]
    return output


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, products: Products) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.products, ctx.shape = products, input.shape
        # Of three dimensions it is a view, which a node's output may not be: in-place operations on it are refused.
        return F.linear(input, weight, bias).detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        gradient: Tensor | None = ctx.products.gradient_of_input(None, (rows(grad_output), weight))
        return None if gradient is None else gradient.view(ctx.shape), None, None, None
