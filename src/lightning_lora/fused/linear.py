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

_NOTHING = (None,) * 8  # a gradient for each argument of the node
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
    input: Tensor, frozen: Frozen, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float = 0.0
) -> Tensor:
    """``F.linear`` with a frozen weight, and a low-rank update that trains (:func:`lora_linear_and_input`)."""
    return lora_linear_and_input(input, frozen, lora_A, lora_B, scaling=scaling, dropout=dropout, passes_on=False)[0]


def lora_linear_and_input(
    input: Tensor,
    frozen: Frozen,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    passes_on: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`lora_linear`, and a stand-in for the input.

    Args:
        input: ``(..., in_features)``, of floating point; its dtype is that of all products.
        frozen: Weight and bias.
        lora_A: ``(rank, in_features)``, at least in fp32.
        lora_B: ``(out_features, rank)``, at least in fp32.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of the input of the update.
        passes_on: False: no stand-in.

    Returns:
        ``(..., out_features)`` in the input's dtype, and the input itself as a tensor whose gradient, if something
        gives it one, becomes the input's, with what this layer adds to it.
    """
    drop = draw_dropout(dropout) if dropout > 0.0 else None
    arguments = input, frozen, lora_A, lora_B, scaling, drop, passes_on
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        whole: tuple[Tensor, Tensor | None] = _LoRALinear.apply(*arguments, None)  # type: ignore[no-untyped-call]
        return whole
    products: list[_Products] = []
    stub, passed_on = _LoRALinear.apply(*arguments, products)  # type: ignore[no-untyped-call]
    output: Tensor = _Deferred.apply(stub, products)  # type: ignore[no-untyped-call]
    return output, passed_on


class _Products(NamedTuple):
    """The products whose sum is the output, in the order of their cost."""

    hidden: Tensor
    second: Tensor  # B with all factors, in the dtype of the products
    bias: Tensor | None
    x: Tensor
    frozen: Frozen
    shape: torch.Size

    def compute(self) -> Tensor:
        weight = _weight(self.frozen, self.x.dtype)
        output = F.linear(self.hidden, self.second, self.bias).addmm_(self.x, weight.t())
        # A view would be closed to changes in place, which ReLU(inplace=True) behind a layer makes.
        reshaped: Tensor = torch.ops.aten._unsafe_view(output, self.shape)
        return reshaped


class _Deferred(torch.autograd.Function):
    """Computes the output of a :class:`_LoRALinear` that has saved all there is to save, and hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, stub: Tensor, products: list[_Products]) -> Tensor:
        ctx.set_materialize_grads(False)
        return products.pop().compute()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        return grad_output, None


class _LoRALinear(torch.autograd.Function):
    """The layer; with a list for the products, they go there, and the output is a stub that has its shape alone."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        frozen: Frozen,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        drop: Dropout | None,
        passes_on: bool,
        deferred: list[_Products] | None,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = input.dtype
        x = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        kept = x if drop is None else drop.keep(x)
        # Factors go into the small B: an activation is never scaled.
        small_A, small_B = lora_A.to(dtype), (lora_B * _factor(scaling, drop)).to(dtype)
        hidden = F.linear(kept, small_A)
        bias = None if frozen.bias is None else frozen.bias.to(dtype)
        shape = torch.Size((*input.shape[:-1], len(small_B)))
        products = _Products(hidden, small_B, bias, x, frozen, shape)
        weight = frozen.weight if isinstance(frozen.weight, Tensor) else None
        kept_input = input if lora_A.requires_grad else None
        ctx.save_for_backward(kept_input, hidden, weight, lora_A, lora_B, small_A, small_B)
        ctx.frozen = frozen if weight is None else None
        ctx.settings = scaling, drop, input.shape, dtype
        ctx.set_materialize_grads(False)
        if deferred is None:
            output = products.compute()
        else:
            deferred.append(products)
            output = x.new_empty(()).expand(shape)
        return output, input.detach() if passes_on else None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, passed_on: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return passed_on, *_NOTHING[1:]
        input, hidden, weight, lora_A, lora_B, small_A, small_B = ctx.saved_tensors
        scaling, drop, shape, dtype = ctx.settings
        frozen = ctx.frozen or Frozen(weight, None)
        if torch.is_grad_enabled():
            leaves = input, lora_A, lora_B
            return _differentiable_backward(ctx, leaves, grad_output, passed_on, frozen)
        gradient = grad_output if len(shape) == 2 else grad_output.reshape(-1, grad_output.shape[-1])
        gradient = gradient.to(dtype)
        inner = gradient.mm(small_B)
        needs_input, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_A = grad_B = grad_input = None
        if needs_B:
            # The smaller dimension first is the faster order; the copy transposes and widens at once.
            grad_B = torch.empty_like(lora_B).copy_(hidden.t().mm(gradient).t()).mul_(_factor(scaling, drop))
        if needs_A:
            x = input if len(shape) == 2 else input.reshape(-1, shape[-1])
            grad_A = inner.t().mm(x if drop is None else drop.keep(x)).to(lora_A.dtype)
        if needs_input:
            gathered = _gradient_of_input(gradient, _weight(frozen, dtype), inner, small_A, drop, passed_on)
            grad_input = gathered.view(shape)
        return grad_input, None, grad_A, grad_B, *_NOTHING[4:]


def _gradient_of_input(
    gradient: Tensor, weight: Tensor, inner: Tensor, small_A: Tensor, drop: Dropout | None, passed_on: Tensor | None
) -> Tensor:
    """What base and update give, on top of what layers with the same input gave: that tensor is nobody else's."""
    # Accumulating onto a tensor makes the large product slower than the small one.
    if passed_on is None:
        gathered = gradient.mm(weight)
    else:
        gathered = passed_on.reshape(-1, passed_on.shape[-1]).addmm_(gradient, weight)
    return gathered.addmm_(inner, small_A) if drop is None else gathered.add_(drop.keep_(inner.mm(small_A)))


def _weight(frozen: Frozen, dtype: torch.dtype) -> Tensor:
    return frozen.weight if isinstance(frozen.weight, Tensor) else frozen.weight(dtype)


def _factor(scaling: float, drop: Dropout | None) -> float:
    return scaling if drop is None else scaling * drop.scale


def _differentiable_backward(
    ctx: Any, saved: tuple[Tensor | None, Tensor, Tensor], grad_output: Tensor, passed_on: Tensor | None, frozen: Frozen
) -> tuple[Tensor | None, ...]:
    """For ``create_graph=True``: the gradients of the plain composition, as functions of all that they depend on.

    Args:
        ctx: Of the node.
        saved: Input, A and B. A checkpoint gives what was saved once only.
        grad_output: Of the output.
        passed_on: Of the stand-in.
        frozen: Weight and bias.
    """
    input, lora_A, lora_B = saved
    scaling, drop, _, dtype = ctx.settings
    if input is None:
        raise RuntimeError("lora_linear keeps no input for a frozen lora_A, and has no second derivative without it.")
    leaves = [tensor for tensor, needed in zip((input, lora_A, lora_B), _needed(ctx), strict=True) if needed]
    with torch.enable_grad():
        output = reference(input, frozen, lora_A, lora_B, scaling=scaling, drop=drop)
        found = iter(torch.autograd.grad(output, leaves, grad_output.to(dtype), create_graph=True))
    gradients = [next(found) if needed else None for needed in _needed(ctx)]
    if passed_on is not None:
        gradients[0] = passed_on if gradients[0] is None else gradients[0] + passed_on
    return gradients[0], None, gradients[1], gradients[2], *_NOTHING[4:]


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    needed = ctx.needs_input_grad
    return needed[0], needed[2], needed[3]


def reference(
    input: Tensor, frozen: Frozen, lora_A: Tensor, lora_B: Tensor, *, scaling: float, drop: Dropout | None = None
) -> Tensor:
    """What :func:`lora_linear` computes, from torch's own operations."""
    dtype = input.dtype
    kept = input
    if drop is not None:
        mask = drop.keep(torch.ones_like(input)) * drop.scale
        kept = input * mask
    update = F.linear(F.linear(kept, lora_A.to(dtype)), (lora_B * scaling).to(dtype))
    bias = None if frozen.bias is None else frozen.bias.to(dtype)
    return F.linear(input, _weight(frozen, dtype), bias) + update
