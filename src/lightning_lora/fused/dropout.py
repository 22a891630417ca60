"""Dropout whose mask is drawn again from a number wherever it is needed, so that nothing of it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

_LEVELS = 128  # of a lane of 7 bits
_FIXED: ContextVar[int | None] = ContextVar("seed of all masks", default=None)
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(NamedTuple):
    """One draw of dropout.

    Attributes:
        seed: Of the mask.
        dropped: Of 128 values, how many are dropped on average.
    """

    seed: int
    dropped: int

    @property
    def scale(self) -> float:
        """Factor of what is kept, so that the expectation stays."""
        return _LEVELS / (_LEVELS - self.dropped)

    def keep(self, values: Tensor) -> Tensor:
        """The values where the mask keeps them, zero elsewhere; not scaled."""
        mask = self._mask(values)
        return torch.bitwise_and(values.view(mask.dtype), mask).view(values.dtype)

    def keep_(self, values: Tensor) -> Tensor:
        """:meth:`keep`, in place."""
        mask = self._mask(values)
        values.view(mask.dtype).bitwise_and_(mask)
        return values

    def _mask(self, values: Tensor) -> Tensor:
        """All bits set where a value is kept, none elsewhere; each byte of a random number decides about one value."""
        generator = torch.Generator(device=values.device).manual_seed(self.seed)
        drawn = torch.empty(-(-values.numel() // 8), dtype=torch.int64, device=values.device)
        lanes = drawn.random_(-(2**63), None, generator=generator).view(torch.int8)[: values.numel()]
        lanes.bitwise_and_(_LEVELS - 1)
        torch.sub(self.dropped - 1, lanes, out=lanes)  # negative where it is kept
        return lanes.bitwise_right_shift_(7).view(values.shape).to(_INTEGER[values.dtype.itemsize])


def draw_dropout(probability: float) -> Dropout:
    """Draw from torch's random stream on the CPU, on every device: no synchronisation, and a resume continues it.

    The share that is dropped is one of 128 levels; which of the two beside ``probability`` is drawn, too, so that the
    mean is exact.
    """
    fixed = _FIXED.get()
    seed = int(torch.randint(0, 2**31 - 1, (), device="cpu")) if fixed is None else fixed
    exact = probability * _LEVELS
    below = int(exact)
    above = (seed % 65_521) / 65_521 < exact - below
    return Dropout(seed, min(below + above, _LEVELS - 1))


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Within this context nothing is drawn from torch's stream, for a run on tensors without values."""
    token = _FIXED.set(seed)
    try:
        yield
    finally:
        _FIXED.reset(token)
