"""The fused forward and backward of a frozen linear layer with a low-rank update, dense or from codes.

With ``W`` frozen, ``y = x W^T + b + scaling * drop(x) A^T B^T`` (LoRA, arXiv:2106.09685, eq. 3) needs for its backward
the small ``h = drop(x) A^T``, A and B, and, for the gradient of ``A``, the input, which the layers around it hold
anyway. No copy of an activation in another dtype is made, no mask is saved, and the update is not a tensor of its own:
the large product is accumulated onto it, in the precision of the product, and rounded once. So an update that is small
beside ``x W^T`` is not lost to the rounding of a bf16 output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.fused.dropout import Dropout, draw_dropout

Dequantize = Callable[[torch.dtype], Tensor]


class Frozen(NamedTuple):
    """The frozen part.

    Attributes:
        weight: ``(out_features, in_features)`` in the dtype of the product, or a function that makes it.
        bias: ``(out_features,)`` or None.
    """

    weight: Tensor | Dequantize
    bias: Tensor | None


def lora_linear(
    input: Tensor,
    frozen: Frozen,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    kernels: str = "torch",
) -> Tensor:
    """``F.linear`` with a frozen weight, and a low-rank update that trains.

    Args:
        input: ``(..., in_features)``, of floating point; its dtype is that of all products.
        frozen: Weight and bias.
        lora_A: ``(rank, in_features)``, at least in fp32.
        lora_B: ``(out_features, rank)``, at least in fp32.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of the input of the update.
        kernels: For the products with dropout, see :func:`~lightning_lora.fused.dropout.draw_dropout`.

    Returns:
        ``(..., out_features)`` in the input's dtype.
    """
    drop = draw_dropout(dropout, like=input, kernels=kernels)
    arguments = input, frozen, lora_A, lora_B, scaling, drop
    if not is_deferred():
        whole: Tensor = _LoRALinear.apply(*arguments, None)  # type: ignore[no-untyped-call]
        return whole
    products: list[Products] = []
    return compute_deferred(_LoRALinear.apply(*arguments, products), products)  # type: ignore[no-untyped-call]


class Products(NamedTuple):
    """The products whose sum is the output, in the order of their cost."""

    hidden: Tensor
    second: Tensor  # B with all factors, in the dtype of the products
    bias: Tensor | None
    x: Tensor
    frozen: Frozen
    shape: torch.Size

    def compute(self) -> Tensor:
        """``(..., out_features)``."""
        weight = weight_in(self.frozen, self.x.dtype)
        output = F.linear(self.hidden, self.second, self.bias).addmm_(self.x, weight.t())
        # A view would be closed to changes in place, which ReLU(inplace=True) behind a layer makes.
        reshaped: Tensor = torch.ops.aten._unsafe_view(output, self.shape)
        return reshaped

    def output(self, deferred: list[Products] | None) -> Tensor:
        """The output; with a list to put the products in, a stub that has its shape alone."""
        if deferred is None:
            return self.compute()
        deferred.append(self)
        return self.x.new_empty(()).expand(self.shape)


def is_deferred() -> bool:
    """Whether something looks at what is saved, as a checkpoint does, whose recomputation ends with the last of it.

    Then a node that saves all there is to save, and computes the output in a second one, leaves out the large product.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def compute_deferred(stub: Tensor, products: list[Products]) -> Tensor:
    """The output of a node that made a stub of it."""
    output: Tensor = _Deferred.apply(stub, products)  # type: ignore[no-untyped-call]
    return output


class _Deferred(torch.autograd.Function):
    """Computes the output of a node that has saved all there is to save, and hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, stub: Tensor, products: list[Products]) -> Tensor:
        ctx.set_materialize_grads(False)
        return products.pop().compute()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        return grad_output, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        frozen: Frozen,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        drop: Dropout,
        deferred: list[Products] | None,
    ) -> Tensor:
        x = rows(input)
        factor = scaling * drop.scale
        small_A, small_B = lora_A.to(x.dtype), scaled(lora_B, factor, x.dtype)
        hidden = drop.project(x, small_A)
        weight = frozen.weight if isinstance(frozen.weight, Tensor) else None
        kept_input = input if lora_A.requires_grad else None
        ctx.save_for_backward(kept_input, hidden, weight, lora_A, lora_B, small_A, small_B)
        ctx.frozen = frozen if weight is None else None
        ctx.settings = scaling, factor, drop, input.shape, x.dtype
        ctx.set_materialize_grads(False)
        shape = torch.Size((*input.shape[:-1], len(small_B)))
        return Products(hidden, small_B, bias_in(frozen, x.dtype), x, frozen, shape).output(deferred)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 7
        input, hidden, weight, lora_A, lora_B, small_A, small_B = ctx.saved_tensors
        _, factor, drop, shape, dtype = ctx.settings
        frozen = ctx.frozen or Frozen(weight, None)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, (input, lora_A, lora_B), grad_output, frozen)
        gradient = rows(grad_output).to(dtype)
        inner = gradient.mm(small_B)
        needs_input, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_B = gradient_of_second(hidden, gradient, lora_B, factor) if needs_B else None
        gathered = gradient.mm(weight_in(frozen, dtype)) if needs_input else None
        x = rows(input) if needs_A else None
        grad_A, grad_input = drop.pull_back(inner, small_A, x=x, to_input=needs_input, gathered=gathered)
        return (
            shaped(grad_input, shape),
            None,
            None if grad_A is None else grad_A.to(lora_A.dtype),
            grad_B,
            None,
            None,
            None,
        )


def rows(values: Tensor) -> Tensor:
    """``(..., features)`` as a matrix."""
    return values if values.dim() == 2 else values.reshape(-1, values.shape[-1])


def scaled(lora_B: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """B with all factors in it: they go into what is small, an activation is never scaled."""
    return (lora_B * factor).to(dtype)


def bias_in(frozen: Frozen, dtype: torch.dtype) -> Tensor | None:
    """The bias in the dtype of the product."""
    return None if frozen.bias is None else frozen.bias.to(dtype)


def weight_in(frozen: Frozen, dtype: torch.dtype) -> Tensor:
    """The weight in the dtype of the product."""
    return frozen.weight if isinstance(frozen.weight, Tensor) else frozen.weight(dtype)


def gradient_of_second(hidden: Tensor, gradient: Tensor, lora_B: Tensor, factor: float) -> Tensor:
    """``factor * gradient^T hidden`` in the dtype and layout of B."""
    # The smaller dimension first is the faster order; the copy transposes and widens at once.
    return torch.empty_like(lora_B).copy_(hidden.t().mm(gradient).t()).mul_(factor)


def shaped(gradient: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The gradient of the input in its shape."""
    return None if gradient is None else gradient.view(shape)


def _differentiable_backward(
    ctx: Any, saved: tuple[Tensor | None, Tensor, Tensor], grad_output: Tensor, frozen: Frozen
) -> tuple[Tensor | None, ...]:
    """For ``create_graph=True``: the gradients of the plain composition, as functions of all that they depend on.

    Args:
        ctx: Of the node.
        saved: Input, A and B. A checkpoint gives what was saved once only.
        grad_output: Of the output.
        frozen: Weight and bias.
    """
    input, lora_A, lora_B = saved
    scaling, _, drop, _, dtype = ctx.settings
    if input is None:
        raise RuntimeError("lora_linear keeps no input for a frozen lora_A, and has no second derivative without it.")
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]
    leaves = [tensor for tensor, wanted in zip((input, lora_A, lora_B), needed, strict=True) if wanted]
    with torch.enable_grad():
        output = reference(input, frozen, lora_A, lora_B, scaling=scaling, drop=drop)
        found = iter(torch.autograd.grad(output, leaves, grad_output.to(dtype), create_graph=True))
    grad_input, grad_A, grad_B = (next(found) if wanted else None for wanted in needed)
    return grad_input, None, grad_A, grad_B, None, None, None


def reference(
    input: Tensor, frozen: Frozen, lora_A: Tensor, lora_B: Tensor, *, scaling: float, drop: Dropout | None = None
) -> Tensor:
    """What :func:`lora_linear` computes, from torch's own operations."""
    dtype, drop = input.dtype, drop or Dropout()
    update = F.linear(F.linear(drop.keep(input) * drop.scale, lora_A.to(dtype)), (lora_B * scaling).to(dtype))
    return F.linear(input, weight_in(frozen, dtype), bias_in(frozen, dtype)) + update
