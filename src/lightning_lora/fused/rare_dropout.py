"""Dropout of few values on a CPU: their places are drawn, not a mask.

A CPU draws one random number after the other, and a mask is written and read beside the values. Where one value of 20
is dropped, the places of those take half of the time of all this; where one of 10 is, they take more.

If each place of n is hit by a Poisson number of draws with mean ``-log(1 - p)``, it is spared with probability
``1 - p``, independently of all others. All hits together are a Poisson number with n times that mean, and each of them
falls on any place alike: that many places are drawn, some of them twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.fused.dropout import Mask, Pull, WithMask
from lightning_lora.fused.products import TORCH, Products

_RARE = 0.07
_PLACES = 2**26  # half of a 64-bit number hits each of them alike to within 1.6 %


def is_rare(probability: float, like: Tensor) -> bool:
    """Whether drawing places is faster than a mask."""
    return probability <= _RARE and like.device.type == "cpu" and like.numel() < _PLACES


class RareDropout(WithMask):
    """Drops with the probability: on average exactly, each single one of n places to within ``n / 2**32`` of it.

    Args:
        probability: Of dropping a value, in ``(0, 1)``.
        seed: Of the places.
        products: What computes the products of the update.
    """

    def __init__(self, probability: float, seed: int, products: Products = TORCH) -> None:
        super().__init__(products)
        self.seed, self._hits = seed, -math.log1p(-probability)
        self.scale = 1.0 / (1.0 - probability)

    @override
    def mask(self, shape: torch.Size, like: Tensor) -> Mask:
        lanes = torch.full(shape, -1, dtype=torch.int8, device="cpu")
        return Mask.of(_fill(lanes, self._places(shape.numel())), like)

    @override
    def keep(self, values: Tensor) -> Tensor:
        if values.requires_grad and torch.is_grad_enabled():
            return super().keep(values)
        return _without(values, self._places(values.numel()))

    @override
    def pull_back(self, pull: Pull) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():
            return super().pull_back(pull)
        (inner, small_A, _), x, factor_A, to_input, gathered, base = pull
        places = self._places(len(inner) * small_A.shape[1])
        grad_A = None if x is None else self.products.gradient_of_first(inner, _without(x, places), factor_A)
        if not to_input:
            return grad_A, None
        gathered = self.products.gradient_of_input(gathered, base)
        if gathered is None:
            added = self.products.gradient_of_input(None, None, pull.update)
            assert added is not None
            return grad_A, _fill(added, places)
        gathered = gathered.contiguous()
        flat = gathered.view(-1)
        spared = flat.index_select(0, places)
        self.products.gradient_of_input(gathered, None, pull.update)
        flat.index_copy_(0, places, spared)
        return grad_A, gathered

    def _places(self, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        mean = torch.tensor(self._hits * size, dtype=torch.float64, device="cpu")
        count = int(torch.poisson(mean, generator=generator))
        # Two places of each 64-bit number: a half, from 0 to 2**32, times the size, without its lower 32 bits.
        drawn = torch.empty((count + 1) // 2, dtype=torch.int64, device="cpu").random_(
            -(2**63), None, generator=generator
        )
        halves = drawn.view(torch.int32)[:count].to(torch.int64)
        return halves.add_(2**31).mul_(size).bitwise_right_shift_(32)


def _without(values: Tensor, places: Tensor) -> Tensor:
    return _fill(values.clone(memory_format=torch.contiguous_format), places)


def _fill(values: Tensor, places: Tensor) -> Tensor:
    values.view(-1).index_fill_(0, places, 0)
    return values
