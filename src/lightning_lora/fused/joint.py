"""Layers with the same input, such as q, k and v: one product with all their A, one mask, one gradient of the input.

The first layer's node multiplies by the A of those that follow, too, and saves the input once, for the gradients of all
A in one product. The others' nodes have the other two products alone::

    h_q, h_k, h_v = scaling drop(x) [A_q, A_k, A_v]^T,  y_q = x W_q^T + h_q B_q^T     lead
    y_k = x W_k^T + h_k B_k^T                                                         follow

Each node hands a stand-in for the input to the next: the gradient of the stand-in arrives at the node before, which
accumulates its own part onto it, in place, where autograd would add the parts up out of place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.fused.draw import draw_dropout
from lightning_lora.fused.factored_input import save_as_factors
from lightning_lora.fused.linear import (
    Compute,
    Frozen,
    LoRALinear,
    Uses,
    apply_node,
    output_of,
    rows,
    stand_in_for,
    weight_or_maker,
)
from lightning_lora.fused.products import Products


class Hidden(NamedTuple):
    """The input times one A.

    Attributes:
        source: The A.
        version: Of it.
        scaling: Of the update.
        values: ``(tokens, rank)``, with all factors.
    """

    source: Tensor
    version: int
    scaling: float
    values: Tensor


@dataclass(slots=True)
class Joint:
    """What layers with the same input share.

    Attributes:
        input: A stand-in for it: its gradient becomes the input's.
        hidden: For each layer that has not taken its own.
        dropout: Probability of dropping an element of the input of an update.
        uses: What became of it.
        products: What computes the products of the updates.
    """

    input: Tensor
    hidden: list[Hidden]
    dropout: float
    uses: Uses
    products: Products

    def part_of(self, lora_A: Tensor, *, scaling: float, dropout: float) -> Hidden | None:
        """A layer's product with its A, as it is now, if it is among them."""
        if self.uses.ended or dropout != self.dropout:
            return None
        wanted = lora_A._version, scaling
        fits = (part for part in self.hidden if part.source is lora_A and (part.version, part.scaling) == wanted)
        return next(fits, None)


def lead(
    input: Tensor,
    frozen: Frozen,
    lora_As: Sequence[Tensor],
    lora_B: Tensor,
    *,
    scalings: Sequence[float],
    dropout: float = 0.0,
    kernels: str = "torch",
) -> tuple[Tensor, Joint]:
    """:func:`~lightning_lora.fused.linear.lora_linear` of a layer, and what those that follow need of its input.

    Args:
        input: ``(..., in_features)``, of floating point; its dtype is that of all products.
        frozen: Weight and bias.
        lora_As: The layer's own ``(rank, in_features)`` and one or more of others, of one dtype, and all or none of
            them trained.
        lora_B: ``(out_features, rank)``, at least in fp32.
        scalings: Factor of each update.
        dropout: Probability of dropping an element of the input; one mask for all.
        kernels: What computes the products, see :func:`~lightning_lora.fused.draw.draw_dropout`.

    Returns:
        ``(..., out_features)`` in the input's dtype, and what the others share with it.
    """
    drop, uses = draw_dropout(dropout, like=input, kernels=kernels), Uses()
    factors = tuple(scaling * drop.scale for scaling in scalings)
    output, stand_in, *found = apply_node(LoRALinear, input, lora_B, frozen, factors, drop, uses, *lora_As)
    if lora_As[0].requires_grad:
        save_as_factors(output.grad_fn, input)
    others = zip(lora_As[1:], scalings[1:], found, strict=True)
    hidden = [Hidden(lora_A, lora_A._version, scaling, values) for lora_A, scaling, values in others]
    return output, Joint(stand_in, hidden, dropout, uses, drop.products)


def follow(joint: Joint, own: Hidden, frozen: Frozen, lora_B: Tensor) -> tuple[Tensor, Joint | None]:
    """A layer's output, from what it shares with others.

    Args:
        joint: Of this layer's input; it is changed.
        own: The layer's part of it, which nobody takes again.
        frozen: Weight and bias.
        lora_B: ``(out_features, rank)``, at least in fp32.

    Returns:
        ``(..., out_features)`` in the input's dtype, and what is left for the layers that come, if any.
    """
    joint.hidden = [part for part in joint.hidden if part is not own]
    joint.uses.count += 1
    passes_on = bool(joint.hidden)
    output, stand_in = apply_node(_Follower, joint.input, own.values, lora_B, frozen, joint.products, passes_on)
    if not passes_on:
        return output, None
    joint.input = stand_in
    return output, joint


class _Follower(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        deferred: list[Compute] | None,
        input: Tensor,
        hidden: Tensor,
        lora_B: Tensor,
        frozen: Frozen,
        products: Products,
        passes_on: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = input.dtype
        small_B = lora_B.to(dtype)
        weight, make_weight = weight_or_maker(frozen)
        ctx.save_for_backward(hidden, weight)
        ctx.settings = products, make_weight, lora_B, lora_B._version, input.shape, dtype
        ctx.set_materialize_grads(False)
        output = output_of(deferred, input, frozen, hidden, small_B, products)
        return output, stand_in_for(ctx, input) if passes_on else None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, passed_on: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, passed_on, *(None,) * 5
        hidden, weight = ctx.saved_tensors
        products, make_weight, lora_B, version, shape, dtype = ctx.settings
        if lora_B._version != version:
            raise RuntimeError("lora_B was changed in place, and the gradients need it as it was.")
        gradient, small_B = rows(grad_output).to(dtype), lora_B.to(dtype)
        _, needs_input, needs_hidden, needs_B, *_ = ctx.needs_input_grad
        inner, grad_B = products.gradients_of_update(
            gradient, small_B, hidden=hidden if needs_B else None, like=lora_B, to_hidden=needs_hidden
        )
        grad_input = None
        if needs_input:
            gathered = None if passed_on is None else rows(passed_on)
            weight = weight if make_weight is None else make_weight(dtype)
            grad_input = products.gradient_of_input(gathered, (gradient, weight))
            grad_input = None if grad_input is None else grad_input.view(shape)
        return None, grad_input, inner, grad_B, None, None, None
