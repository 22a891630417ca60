"""The products of a low-rank update, and of the frozen weight that it is added to, by torch's own operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

Base = tuple[Tensor, Tensor]
PLAIN_TENSORS = (Tensor, Parameter)


class Update(NamedTuple):
    """What a projection adds to the gradient of its input: ``factor inner A``.

    Attributes:
        inner: ``(tokens, rank)``: the gradient of what :meth:`Products.project` returned.
        small_A: ``(rank, in_features)``.
        factor: Of the projection.
    """

    inner: Tensor
    small_A: Tensor
    factor: float = 1.0


class Products:
    """``hidden = factor x A^T``, ``x W^T + hidden B^T``, and the gradients of both; a subclass has another way."""

    def project(self, x: Tensor, small_A: Tensor, factor: float = 1.0) -> Tensor:
        """``factor x A^T``.

        Args:
            x: ``(tokens, in_features)``.
            small_A: ``(rank, in_features)`` in the dtype of ``x``.
            factor: Of the product.

        Returns:
            ``(tokens, rank)``.
        """
        return product(x, small_A.t(), factor)

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, small_B: Tensor, *, out: Tensor
    ) -> None:
        """``out = hidden B^T + x W^T + bias``, rounded once or twice.

        Args:
            x: ``(tokens, in_features)``.
            weight: ``(out_features, in_features)``.
            bias: ``(out_features,)``.
            hidden: ``(tokens, rank)``.
            small_B: ``(out_features, rank)``; all are of one dtype.
            out: ``(tokens, out_features)``, written to.
        """
        if bias is None:
            torch.mm(hidden, small_B.t(), out=out)
        else:
            torch.addmm(bias, hidden, small_B.t(), out=out)
        out.addmm_(x, weight.t())

    def gradients_of_update(
        self, gradient: Tensor, small_B: Tensor, *, hidden: Tensor | None, like: Tensor, to_hidden: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of ``hidden B^T``.

        Args:
            gradient: ``(tokens, out_features)``: of the result.
            small_B: ``(out_features, rank)``.
            hidden: ``(tokens, rank)``, if the gradient of B is wanted.
            like: B: its gradient has this dtype and layout.
            to_hidden: Whether the gradient of ``hidden`` is wanted.

        Returns:
            ``gradient B`` and ``gradient^T hidden``.
        """
        inner = gradient.mm(small_B) if to_hidden else None
        if hidden is None:
            return inner, None
        # The smaller dimension first is the faster order; the copy transposes and widens at once.
        return inner, torch.empty_like(like).copy_(hidden.t().mm(gradient).t())

    def gradient_of_first(self, inner: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """``factor inner^T x`` from the gradient ``(tokens, rank)`` of what :meth:`project` returned."""
        return product(inner.t(), x, factor)

    def gradient_of_input(
        self, gathered: Tensor | None, base: Base | None, update: Update | None = None
    ) -> Tensor | None:
        """``gathered + gradient W + factor inner A``, of what there is.

        Args:
            gathered: ``(tokens, in_features)``. Nobody else has that tensor: it is changed where autograd does not
                look.
            base: The gradient ``(tokens, out_features)`` of the output of the frozen part, and its weight.
            update: Of the projection.
        """
        if base is not None:
            gathered = add_product(gathered, *base)
        return gathered if update is None else add_product(gathered, *update)


TORCH = Products()


def is_zero(small_B: Tensor) -> bool:
    """Whether an update has not begun: then a layer's output is to be the base's to the last bit, as torch computes it.

    Of a tensor that may have no values, such as torch's FakeTensor, it is taken to have begun.
    """
    if type(small_B) not in PLAIN_TENSORS:
        return False
    return not small_B.numel() or (small_B[0, 0].item() == 0.0 and not bool(small_B.any()))


def product(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """``factor left right``, rounded once."""
    if factor == 1.0:
        return left.mm(right)
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=factor)


def add_product(gathered: Tensor | None, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """``gathered + factor left right``, in place where autograd does not look."""
    if gathered is None:
        return product(left, right, factor)
    return (gathered.clone() if torch.is_grad_enabled() else gathered).addmm_(left, right, alpha=factor)
