"""Layers with the same input, such as q, k and v: one product with all their A, one mask, one gradient of the input.

Where a layer alone is one node (:mod:`lightning_lora.fused.linear`), several of them are one node for the products with
A, and one for each layer's other two::

    h_q, h_k, h_v = drop(x) [A_q, A_k, A_v]^T        shrink: saves x once, for the gradients of all A in one product
    y_q = x W_q^T + h_q B_q^T, and so on             expand: saves h_q

Each node hands a stand-in for the input to the next: the gradient of the stand-in arrives at the node before, which
accumulates its own part onto it, in place, where autograd would add the parts up out of place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.fused.dropout import Dropout, add_product, draw_dropout
from lightning_lora.fused.linear import (
    Frozen,
    Products,
    bias_in,
    compute_deferred,
    gradient_of_second,
    is_deferred,
    rows,
    scaled,
    shaped,
    weight_in,
)


@dataclass
class Uses:
    """How many layers took their part, and whether a backward pass has begun, after which none may."""

    count: int = 0
    ended: bool = False


class Hidden(NamedTuple):
    """The input times one A."""

    factor: Tensor
    version: int
    values: Tensor


class Joint(NamedTuple):
    """What layers with the same input share.

    Attributes:
        input: A stand-in for it: its gradient becomes the input's.
        hidden: For each layer that has not taken its own.
        dropout: Probability of dropping an element of the input of an update.
        kept_scale: Factor of what was kept.
        uses: What became of it.
    """

    input: Tensor
    hidden: tuple[Hidden, ...]
    dropout: float
    kept_scale: float
    uses: Uses

    def serves(self, lora_A: Tensor, dropout: float) -> bool:
        """Whether a layer's product with its A, as it is now, is among them."""
        if self.uses.ended or dropout != self.dropout:
            return False
        return any(hidden.factor is lora_A and hidden.version == lora_A._version for hidden in self.hidden)


def shrink(input: Tensor, lora_As: Sequence[Tensor], *, dropout: float = 0.0, kernels: str = "torch") -> Joint:
    """The products of an input with the A of several layers.

    Args:
        input: ``(..., in_features)``, of floating point; its dtype is that of all products.
        lora_As: Each ``(rank, in_features)``, of one dtype, and all or none of them trained.
        dropout: Probability of dropping an element of the input; one mask for all.
        kernels: For the products with dropout, see :func:`~lightning_lora.fused.dropout.draw_dropout`.
    """
    drop = draw_dropout(dropout, like=input, kernels=kernels)
    uses = Uses()
    stand_in, *found = _Shrink.apply(input, drop, uses, *lora_As)  # type: ignore[no-untyped-call]
    hidden = (Hidden(lora_A, lora_A._version, values) for lora_A, values in zip(lora_As, found, strict=True))
    return Joint(stand_in, tuple(hidden), dropout, drop.scale, uses)


def expand(
    joint: Joint, frozen: Frozen, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> tuple[Tensor, Joint | None]:
    """A layer's output, from what it shares with others.

    Args:
        joint: Of this layer's input.
        frozen: Weight and bias.
        lora_A: The layer's own, which tells its part.
        lora_B: ``(out_features, rank)``, at least in fp32.
        scaling: Factor of the update.

    Returns:
        ``(..., out_features)`` in the input's dtype, and what is left for the layers that come, if any.
    """
    own = next(hidden for hidden in joint.hidden if hidden.factor is lora_A)
    rest = tuple(hidden for hidden in joint.hidden if hidden is not own)
    joint.uses.count += 1
    arguments = joint.input, own.values, frozen, lora_B, scaling * joint.kept_scale, bool(rest)
    if is_deferred():
        products: list[Products] = []
        stub, stand_in = _Expand.apply(*arguments, products)  # type: ignore[no-untyped-call]
        output = compute_deferred(stub, products)
    else:
        output, stand_in = _Expand.apply(*arguments, None)  # type: ignore[no-untyped-call]
    return output, joint._replace(input=stand_in, hidden=rest) if rest else None


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, drop: Dropout, uses: Uses, *lora_As: Tensor) -> tuple[Tensor, ...]:
        x = rows(input)
        stacked = torch.cat(lora_As).to(x.dtype)
        hidden = drop.project(x, stacked)
        kept_input = input if lora_As[0].requires_grad else None
        ctx.save_for_backward(kept_input, stacked)
        # Not saved: a layer that was not called in the end may have its A changed before the backward pass.
        ctx.lora_As, ctx.versions = lora_As, [lora_A._version for lora_A in lora_As]
        ctx.settings, ctx.uses, ctx.again = (drop, input.shape), uses, None
        ctx.set_materialize_grads(False)
        stand_in = input.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(stand_in)
        return stand_in, *torch.split(hidden, [len(lora_A) for lora_A in lora_As], dim=1)

    @staticmethod
    def backward(ctx: Any, passed_on: Tensor | None, *inners: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.uses.ended = True
        used = [index for index, inner in enumerate(inners) if inner is not None]
        if not used:
            return passed_on, None, None, *inners
        input, stacked = _saved(ctx, whole=len(used) == ctx.uses.count)
        (drop, shape), lora_As = ctx.settings, ctx.lora_As
        if torch.is_grad_enabled():
            if any(lora_As[index]._version != ctx.versions[index] for index in used):
                raise RuntimeError(
                    "A lora_A was changed in place, and a derivative of the gradient needs it as it was."
                )
            stacked = torch.cat(lora_As).to(stacked.dtype)
        ranks = [len(lora_A) for lora_A in lora_As]
        inner, chosen = _joined(inners, used, dim=1), stacked
        if len(used) < len(ranks):
            chosen = _joined(torch.split(stacked, ranks), used, dim=0)
        x = None if input is None else rows(input)
        gathered = None if passed_on is None else rows(passed_on)
        grad_A, grad_input = drop.pull_back(inner, chosen, x=x, to_input=ctx.needs_input_grad[0], gathered=gathered)
        grad_As: list[Tensor | None] = [None for _ in lora_As]
        if grad_A is not None:
            for index, part in zip(used, torch.split(grad_A, [ranks[index] for index in used]), strict=True):
                grad_As[index] = part.to(lora_As[index].dtype)
        return shaped(grad_input, shape), None, None, *grad_As


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hidden: Tensor,
        frozen: Frozen,
        lora_B: Tensor,
        factor: float,
        passes_on: bool,
        deferred: list[Products] | None,
    ) -> tuple[Tensor, Tensor | None]:
        x = rows(input)
        small_B = scaled(lora_B, factor, x.dtype)
        weight = frozen.weight if isinstance(frozen.weight, Tensor) else None
        ctx.save_for_backward(hidden, weight, lora_B, small_B)
        ctx.frozen = frozen if weight is None else None
        ctx.settings = factor, input.shape, x.dtype
        ctx.set_materialize_grads(False)
        stand_in = input.detach() if passes_on else None
        if stand_in is not None and not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(stand_in)
        shape = torch.Size((*input.shape[:-1], len(small_B)))
        products = Products(hidden, small_B, bias_in(frozen, x.dtype), x, frozen, shape)
        return products.output(deferred), stand_in

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, passed_on: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return passed_on, *(None,) * 6
        hidden, weight, lora_B, small_B = ctx.saved_tensors
        factor, shape, dtype = ctx.settings
        frozen = ctx.frozen or Frozen(weight, None)
        gradient = rows(grad_output).to(dtype)
        if torch.is_grad_enabled():
            small_B = scaled(lora_B, factor, dtype)
        needs_input, needs_hidden, _, needs_B, *_ = ctx.needs_input_grad
        inner = gradient.mm(small_B) if needs_hidden else None
        grad_B = gradient_of_second(hidden, gradient, lora_B, factor) if needs_B else None
        grad_input = None
        if needs_input:
            gathered = None if passed_on is None else rows(passed_on)
            grad_input = add_product(gathered, gradient, weight_in(frozen, dtype)).view(shape)
        return grad_input, inner, None, grad_B, None, None, None


def _saved(ctx: Any, *, whole: bool) -> tuple[Tensor | None, Tensor]:
    """What was saved, also after a backward pass through some of the layers, which frees it.

    Alone, each layer would keep its own until a backward pass of its own: losses of two heads over one detached input.
    """
    if ctx.again is None:
        input, stacked = ctx.saved_tensors
        if not whole:
            ctx.again = input, stacked, None if input is None else input._version
        return input, stacked
    input, stacked, version = ctx.again
    if input is not None and input._version != version:
        raise RuntimeError("The input of adapted layers was changed in place between two backward passes that need it.")
    return input, stacked


def _joined(tensors: Sequence[Tensor | None], used: list[int], *, dim: int) -> Tensor:
    chosen = [tensor for index in used if (tensor := tensors[index]) is not None]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim)
