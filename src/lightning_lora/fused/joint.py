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
from lightning_lora.fused.dropout import add_product
from lightning_lora.fused.linear import (
    Compute,
    Frozen,
    LoRALinear,
    Uses,
    apply_node,
    gradient_of_second,
    output_of,
    rows,
    stand_in_for,
)


class Hidden(NamedTuple):
    """The input times one A, with all factors of the update."""

    factor: Tensor
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
    """

    input: Tensor
    hidden: list[Hidden]
    dropout: float
    uses: Uses

    def serves(self, lora_A: Tensor, scaling: float, dropout: float) -> bool:
        """Whether a layer's product with its A, as it is now, is among them."""
        if self.uses.ended or dropout != self.dropout:
            return False
        wanted = lora_A._version, scaling
        return any(hidden.factor is lora_A and (hidden.version, hidden.scaling) == wanted for hidden in self.hidden)

    def take(self, lora_A: Tensor) -> Tensor:
        """A layer's own part, which nobody takes again."""
        index = next(index for index, hidden in enumerate(self.hidden) if hidden.factor is lora_A)
        self.uses.count += 1
        return self.hidden.pop(index).values


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
        kernels: For the products with dropout, see :func:`~lightning_lora.fused.draw.draw_dropout`.

    Returns:
        ``(..., out_features)`` in the input's dtype, and what the others share with it.
    """
    drop, uses = draw_dropout(dropout, like=input, kernels=kernels), Uses()
    factors = tuple(scaling * drop.scale for scaling in scalings)
    output, stand_in, *found = apply_node(LoRALinear, input, lora_B, frozen, factors, drop, uses, *lora_As)
    others = zip(lora_As[1:], scalings[1:], found, strict=True)
    hidden = [Hidden(lora_A, lora_A._version, scaling, values) for lora_A, scaling, values in others]
    return output, Joint(stand_in, hidden, dropout, uses)


def follow(joint: Joint, frozen: Frozen, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Joint | None]:
    """A layer's output, from what it shares with others.

    Args:
        joint: Of this layer's input; it is changed.
        frozen: Weight and bias.
        lora_A: The layer's own, which tells its part.
        lora_B: ``(out_features, rank)``, at least in fp32.

    Returns:
        ``(..., out_features)`` in the input's dtype, and what is left for the layers that come, if any.
    """
    hidden = joint.take(lora_A)
    if not joint.hidden:
        output, _ = apply_node(_Follower, joint.input, hidden, lora_B, frozen, False)
        return output, None
    output, joint.input = apply_node(_Follower, joint.input, hidden, lora_B, frozen, True)
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
        passes_on: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = input.dtype
        small_B = lora_B.to(dtype)
        weight = frozen.weight if isinstance(frozen.weight, Tensor) else None
        ctx.save_for_backward(hidden, weight, small_B)
        ctx.settings = frozen, lora_B, lora_B._version, input.shape, dtype
        ctx.set_materialize_grads(False)
        output = output_of(deferred, input, frozen, hidden, small_B)
        return output, stand_in_for(ctx, input) if passes_on else None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, passed_on: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, passed_on, *(None,) * 4
        hidden, weight, small_B = ctx.saved_tensors
        frozen, lora_B, version, shape, dtype = ctx.settings
        gradient = rows(grad_output).to(dtype)
        if torch.is_grad_enabled():
            if lora_B._version != version:
                raise RuntimeError("lora_B was changed in place, and a derivative of the gradient needs it as it was.")
            small_B = lora_B.to(dtype)
        _, needs_input, needs_hidden, needs_B, *_ = ctx.needs_input_grad
        inner = gradient.mm(small_B) if needs_hidden else None
        grad_B = gradient_of_second(hidden, gradient, lora_B) if needs_B else None
        grad_input = None
        if needs_input:
            gathered = None if passed_on is None else rows(passed_on)
            weight = frozen.weight(dtype) if weight is None else weight
            grad_input = add_product(gathered, gradient, weight).view(shape)
        return None, grad_input, inner, grad_B, None, None
