"""A layer's input on its way through A, and dropout of it, whose mask is drawn again wherever it is needed.

So nothing of a mask is saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.fused.products import TORCH, Base, Products, Update

LEVELS = 256  # of a byte
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mask(NamedTuple):
    """All bits set where a value is kept, none elsewhere; what is kept is not scaled."""

    bits: Tensor

    @classmethod
    def of(cls, lanes: Tensor, like: Tensor) -> Mask:
        """From -1 for what is kept, and 0, for values of the dtype of ``like``."""
        return cls(lanes.to(_INTEGER[like.dtype.itemsize]))

    def keep(self, values: Tensor) -> Tensor:
        """The values where the mask keeps them, zero elsewhere."""
        if values.requires_grad and torch.is_grad_enabled():  # bits have no derivative
            return values * self.keep(torch.ones_like(values))
        return torch.bitwise_and(values.view(self.bits.dtype), self.bits).view(values.dtype)

    def keep_(self, values: Tensor) -> Tensor:
        """:meth:`keep`, in place where autograd does not look."""
        if values.requires_grad and torch.is_grad_enabled():
            return self.keep(values)
        values.view(self.bits.dtype).bitwise_and_(self.bits)
        return values


class Pull(NamedTuple):
    """The gradient of a projection, and where it goes.

    Attributes:
        update: The gradient with the A of the projection and its factor.
        x: ``(tokens, in_features)``, if the gradient of A is wanted.
        factor_A: Of the gradient of A.
        to_input: Whether the gradient of the input is wanted.
        gathered: What that is added to, see :meth:`~lightning_lora.fused.products.Products.gradient_of_input`.
        base: What is added, too: gradient and weight of the frozen part.
    """

    update: Update
    x: Tensor | None = None
    factor_A: float = 1.0
    to_input: bool = True
    gathered: Tensor | None = None
    base: Base | None = None


class Dropout:
    """One draw of dropout: here of none, everything is kept.

    Attributes:
        scale: Factor of what is kept, so that the expectation stays; none of the methods applies it of its own.
        products: What computes the products of the update.
    """

    scale: float = 1.0

    def __init__(self, products: Products = TORCH) -> None:
        self.products = products

    def keep(self, values: Tensor) -> Tensor:
        """The values that are kept, zero elsewhere."""
        return values

    def project(self, x: Tensor, small_A: Tensor, factor: float = 1.0) -> Tensor:
        """``factor keep(x) A^T``, see :meth:`~lightning_lora.fused.products.Products.project`."""
        return self.products.project(self.keep(x), small_A, factor)

    def pull_back(self, pull: Pull) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that the gradient of a projection gives.

        Returns:
            Of A, ``factor_A inner^T keep(x)``, and of the input, ``gathered + gradient W + factor keep(inner A)``.
        """
        update, x, factor_A, to_input, gathered, base = pull
        grad_A = None if x is None else self.products.gradient_of_first(update.inner, x, factor_A)
        return grad_A, self.products.gradient_of_input(gathered, base, update) if to_input else None


class WithMask(Dropout, ABC):
    """A draw that has a mask."""

    @abstractmethod
    def mask(self, shape: torch.Size, like: Tensor) -> Mask:
        """The mask of values in this shape, of the dtype and on the device of ``like``."""

    @override
    def keep(self, values: Tensor) -> Tensor:
        return self.mask(values.shape, values).keep(values)

    @override
    def pull_back(self, pull: Pull) -> tuple[Tensor | None, Tensor | None]:
        (inner, small_A, _), x, factor_A, to_input, gathered, base = pull
        mask = self.mask(torch.Size((len(inner), small_A.shape[1])), inner)
        grad_A = None if x is None else self.products.gradient_of_first(inner, mask.keep(x), factor_A)
        if not to_input:
            return grad_A, None
        gathered = self.products.gradient_of_input(gathered, base)
        kept = self.products.gradient_of_input(None, None, pull.update)
        assert kept is not None
        kept = mask.keep_(kept)
        return grad_A, kept if gathered is None else kept.add_(gathered)


class MaskedDropout(WithMask):
    """Masks of bits by torch's own operations, on any device.

    Args:
        seed: Of the mask.
        dropped: Of 256 values, how many are dropped on average.
        products: What computes the products of the update.
    """

    def __init__(self, seed: int, dropped: int, products: Products = TORCH) -> None:
        super().__init__(products)
        self.seed, self.dropped, self.scale = seed, dropped, LEVELS / (LEVELS - dropped)

    @override
    def mask(self, shape: torch.Size, like: Tensor) -> Mask:
        size = shape.numel()
        generator = torch.Generator(device=like.device).manual_seed(self.seed)
        drawn = torch.empty(-(-size // 8), dtype=torch.int64, device=like.device)
        lanes = drawn.random_(-(2**63), None, generator=generator).view(torch.int8)[:size]
        # Each byte of a random number decides about one value: those above the rest are dropped. Two passes over bytes
        # make 0 of them, and -1, all bits set, of the others; a comparison and its booleans take four times as long.
        lowest_dropped = LEVELS // 2 - self.dropped
        lanes.clamp_(lowest_dropped - 1, lowest_dropped).sub_(lowest_dropped)
        return Mask.of(lanes.view(shape), like)
