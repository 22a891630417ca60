"""The fused forward and backward of a frozen linear layer with a low-rank update, dense or from codes.

With ``W`` frozen, ``y = x W^T + b + scaling * drop(x) A^T B^T`` (LoRA, arXiv:2106.09685, eq. 3) needs for its backward
the small ``h = drop(x) A^T``, A and B, and, for the gradient of ``A``, the input, which the layers around it hold
anyway. No copy of an activation in another dtype is made, no mask is saved, and the update is not a tensor of its own:
the large product is accumulated onto it, in the precision of the product, and rounded once. So an update that is small
beside ``x W^T`` is not lost to the rounding of a bf16 output. All factors of the update are factors of the products
with A, of which layers with the same input have one together (:mod:`lightning_lora.fused.joint`).

A step of a small model is as long as its Python here, so what runs for each layer has few calls, and no layers of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.fused.draw import draw_dropout
from lightning_lora.fused.dropout import Dropout, Pull
from lightning_lora.fused.factored_input import save_as_factors
from lightning_lora.fused.products import Products, Update

Dequantize = Callable[[torch.dtype], Tensor]
Compute = Callable[[], Tensor]


class Frozen(NamedTuple):
    """The frozen part.

    Attributes:
        weight: ``(out_features, in_features)`` in the dtype of the product, or a function that makes it.
        bias: ``(out_features,)`` or None.
    """

    weight: Tensor | Dequantize
    bias: Tensor | None


@dataclass(slots=True)
class Uses:
    """How many layers took their part of a node, and whether a backward pass has begun, after which none may."""

    count: int = 1
    ended: bool = False


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
        kernels: What computes the products, see :func:`~lightning_lora.fused.draw.draw_dropout`.

    Returns:
        ``(..., out_features)`` in the input's dtype.
    """
    drop = draw_dropout(dropout, like=input, kernels=kernels)
    output: Tensor = apply_node(LoRALinear, input, lora_B, frozen, (scaling * drop.scale,), drop, None, lora_A)
    if lora_A.requires_grad:
        save_as_factors(output.grad_fn, input)
    return output


def apply_node(node: type[torch.autograd.Function], *arguments: Any) -> Any:
    """The outputs of a node whose first argument tells whether, and where, it leaves its output to be computed.

    Where something looks at what is saved, as a checkpoint does, whose recomputation ends with the last of it, a node
    that saves all there is to save, and computes the output in a second one, leaves out the large product.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return node.apply(None, *arguments)  # type: ignore[no-untyped-call]
    deferred: list[Compute] = []
    outputs = node.apply(deferred, *arguments)  # type: ignore[no-untyped-call]
    if isinstance(outputs, Tensor):
        return _Deferred.apply(outputs, deferred)  # type: ignore[no-untyped-call]
    return _Deferred.apply(outputs[0], deferred), *outputs[1:]  # type: ignore[no-untyped-call]


class _Deferred(torch.autograd.Function):
    """Computes the output of a node that has saved all there is to save, and hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, stub: Tensor, deferred: list[Compute]) -> Tensor:
        ctx.set_materialize_grads(False)
        return deferred.pop()()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        return grad_output, None


def output_of(
    deferred: list[Compute] | None,
    input: Tensor,
    frozen: Frozen,
    hidden: Tensor,
    small_B: Tensor,
    products: Products,
) -> Tensor:
    """``hidden B^T + x W^T + b``; with a list to put the products in, a stub that has its shape alone."""
    compute = partial(_sum_of_products, input, frozen, hidden, small_B, products)
    if deferred is None:
        return compute()
    deferred.append(compute)
    return input.new_empty(()).expand(*input.shape[:-1], len(small_B))


def _sum_of_products(input: Tensor, frozen: Frozen, hidden: Tensor, small_B: Tensor, products: Products) -> Tensor:
    x, dtype = rows(input), input.dtype
    # What is returned is no view, which would be closed to changes in place, as ReLU(inplace=True) behind a layer.
    output = input.new_empty((*input.shape[:-1], len(small_B)))
    flat = output if output.dim() == 2 else output.view(len(x), len(small_B))
    bias = None if frozen.bias is None else frozen.bias.to(dtype)
    products.output(x, weight_in(frozen, dtype), bias, hidden, small_B, out=flat)
    return output


class LoRALinear(torch.autograd.Function):
    """The node of a layer, with the products of its input with the A of other layers, if there are any.

    Arguments: where to leave the output, see :func:`apply_node`; ``input`` ``(..., in_features)``; ``lora_B``
    ``(out_features, rank)``; ``frozen``; for each A all factors of its update; the draw of dropout; ``uses``
    for other layers; ``lora_A`` ``(rank, in_features)``, and those of the others.

    Returns the output ``(..., out_features)``; for others, too, a stand-in for the input, whose gradient the node
    accumulates its own onto, in place, and ``(tokens, rank)`` of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        deferred: list[Compute] | None,
        input: Tensor,
        lora_B: Tensor,
        frozen: Frozen,
        factors: tuple[float, ...],
        drop: Dropout,
        uses: Uses | None,
        *lora_As: Tensor,
    ) -> Any:
        """Saves the input, and what has the rank for a dimension."""
        dtype = input.dtype
        (small_A, factor), small_B = _stacked(lora_As, factors, dtype), lora_B.to(dtype)
        hidden = drop.project(rows(input), small_A, factor)
        own = hidden if uses is None else hidden[:, : len(lora_As[0])]
        weight, make_weight = weight_or_maker(frozen)
        ctx.save_for_backward(input if lora_As[0].requires_grad else None, own, weight)
        # Not saved, since the A of a layer that is not called in the end may be changed; cast again, which is exact.
        ctx.trained, ctx.versions = (*lora_As, lora_B), versions_of((*lora_As, lora_B))
        ctx.settings = make_weight, factors, drop, uses, input.shape, dtype
        ctx.set_materialize_grads(False)
        output = output_of(deferred, input, frozen, own, small_B, drop.products)
        if uses is None:
            return output
        ctx.done, ctx.again = set(), None
        _, *others = torch.split(hidden, [len(lora_A) for lora_A in lora_As], dim=1)
        return output, stand_in_for(ctx, input), *others

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, passed_on: Tensor | None = None, *inners: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the input and of what trains; layers that were not called in the end have none."""
        make_weight, factors, drop, uses, shape, dtype = ctx.settings
        *lora_As, lora_B = ctx.trained
        gradients = [grad_output, *inners]
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if uses is not None:
            uses.ended = True
        if not used:
            return None, passed_on, *(None,) * (5 + len(lora_As))
        input, hidden, weight = _saved(ctx, uses, used)
        _, needs_input, needs_B, *_ = ctx.needs_input_grad
        small_A, factor = _stacked_again(ctx, used)
        if torch.is_grad_enabled():
            hidden = _differentiable(ctx, used, input, small_A, factor)
        to_inner = needs_input or input is not None
        grad_A = grad_B = grad_input = None
        base, factor_A = None, factor
        if grad_output is not None:
            gradient = rows(grad_output).to(dtype)
            gradients[0], grad_B = drop.products.gradients_of_update(
                gradient, lora_B.to(dtype), hidden=hidden if needs_B else None, like=lora_B, to_hidden=to_inner
            )
            if needs_input:
                base = gradient, weight if make_weight is None else make_weight(dtype)
        if to_inner:
            inner, x = _joined(gradients, used, dim=1), None if input is None else rows(input)
            gathered = None if passed_on is None else rows(passed_on)
            first = factors[used[0]]
            factor_A = first if all(factors[index] == first for index in used) else factor
            pull = Pull(Update(inner, small_A, factor), x, factor_A, needs_input, gathered, base)
            grad_A, grad_input = drop.pull_back(pull)
        grad_input = None if grad_input is None else grad_input.view(shape)
        return None, grad_input, grad_B, None, None, None, None, *_parts(grad_A, lora_As, factors, factor_A, used)


def weight_or_maker(frozen: Frozen) -> tuple[Tensor | None, Dequantize | None]:
    """The weight to save, or what makes it: a node that held a weight itself would keep it from hooks that move it."""
    return (frozen.weight, None) if isinstance(frozen.weight, Tensor) else (None, frozen.weight)


def versions_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """Tells changes in place; tensors made in inference mode have no version, and no derivatives."""
    return [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


def stand_in_for(ctx: Any, input: Tensor) -> Tensor:
    """What the next layer with this input takes as its input, an output of this one's node."""
    stand_in = input.detach()
    if not input.requires_grad:
        ctx.mark_non_differentiable(stand_in)
    return stand_in


def _stacked(lora_As: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, float]:
    """All A in one, and the factor that is left: what is cast anyway takes it in."""
    first = factors[0]
    if any(factor != first for factor in factors):
        return torch.cat([lora_A * factor for lora_A, factor in zip(lora_As, factors, strict=True)]).to(dtype), 1.0
    stacked = lora_As[0] if len(lora_As) == 1 else torch.cat(list(lora_As))
    if stacked.dtype == dtype or first == 1.0:
        return stacked.to(dtype), first
    return (stacked * first).to(dtype), 1.0


def _saved(ctx: Any, uses: Uses | None, used: list[int]) -> Any:
    """What was saved, also after a backward pass through some of the layers, which frees it.

    Alone, each layer would keep its own until a backward pass of its own: losses of two heads over one detached input.
    """
    if uses is None:
        return ctx.saved_tensors
    if ctx.again is None or not ctx.done.isdisjoint(used):
        saved = ctx.saved_tensors
    else:
        saved, versions = ctx.again
        if versions != versions_of(saved):
            raise RuntimeError(
                "The input or a weight of adapted layers was changed in place between two backward passes that need it."
            )
    ctx.done.update(used)
    ctx.again = None if len(ctx.done) == uses.count else (saved, versions_of(saved))
    return saved


def _stacked_again(ctx: Any, used: list[int]) -> tuple[Tensor, float]:
    """:func:`_stacked` of the used layers; what trains is refused where it is not what the forward pass took."""
    _, factors, *_, dtype = ctx.settings
    needed = [*used, -1] if used[0] == 0 else used
    if versions_of(ctx.trained[index] for index in needed) != [ctx.versions[index] for index in needed]:
        raise RuntimeError("lora_A or lora_B was changed in place, and the gradients need it as it was.")
    return _stacked([ctx.trained[index] for index in used], [factors[index] for index in used], dtype)


def _differentiable(ctx: Any, used: list[int], input: Tensor | None, small_A: Tensor, factor: float) -> Tensor | None:
    """The product with the own A as a function of what it depends on, for ``create_graph=True``."""
    if input is None:
        raise RuntimeError("lora_linear keeps no input for a frozen lora_A, and has no second derivative without it.")
    if used[0] != 0:
        return None
    drop: Dropout = ctx.settings[2]
    return drop.project(rows(input), small_A[: len(ctx.trained[0])], factor)


def _joined(tensors: Sequence[Tensor | None], used: list[int], *, dim: int) -> Tensor:
    chosen = [tensor for index in used if (tensor := tensors[index]) is not None]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim)


def _parts(
    grad_A: Tensor | None, lora_As: Sequence[Tensor], factors: Sequence[float], factor: float, used: list[int]
) -> list[Tensor | None]:
    """The gradient of each A, from that of the used ones stacked, which has ``factor`` of all factors."""
    parts: list[Tensor | None] = [None] * len(lora_As)
    if grad_A is None:
        return parts
    grad_A = grad_A.to(lora_As[0].dtype)
    if len(parts) == 1 and factor == factors[0]:
        return [grad_A]
    for index, part in zip(used, torch.split(grad_A, [len(lora_As[index]) for index in used]), strict=True):
        parts[index] = part if factor == factors[index] else part * factors[index]
    return parts


def rows(values: Tensor) -> Tensor:
    """``(..., features)`` as a matrix."""
    return values if values.dim() == 2 else values.reshape(-1, values.shape[-1])


def weight_in(frozen: Frozen, dtype: torch.dtype) -> Tensor:
    """The weight in the dtype of the product."""
    return frozen.weight if isinstance(frozen.weight, Tensor) else frozen.weight(dtype)


def reference(
    input: Tensor, frozen: Frozen, lora_A: Tensor, lora_B: Tensor, *, scaling: float, drop: Dropout | None = None
) -> Tensor:
    """What :func:`lora_linear` computes, from torch's own operations."""
    dtype, drop = input.dtype, drop or Dropout()
    update = F.linear(F.linear(drop.keep(input) * drop.scale, lora_A.to(dtype)), (lora_B * scaling).to(dtype))
    bias = None if frozen.bias is None else frozen.bias.to(dtype)
    return F.linear(input, weight_in(frozen, dtype), bias) + update
