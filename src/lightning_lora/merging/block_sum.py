"""The sum of a weight and its update, and its proof, in blocks of rows that stay in a CPU's cache.

Over whole weights the update, the sum, its rounding and three norms are some fifteen passes through memory, in blocks
two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.adapter import Adapter
from lightning_lora.layers import update_of

_BLOCK = 2**18  # values, on a CPU: smaller blocks take longer in Python than they save
_LARGE_BLOCK = 2**24  # on other devices, where every operation has to be started


@dataclass(frozen=True)
class Folded:
    """A weight with an update folded in, and Frobenius norms.

    Attributes:
        stored: The weight as it is written, ``(out_features, in_features)``.
        weight: Norm of the weight before.
        update: Norm of the update.
        error: ``|stored - weight - update|``.
    """

    stored: Tensor
    weight: float
    update: float
    error: float

    @property
    def is_finite(self) -> bool:
        """Of all values: which costs nothing here, and a pass over every weight elsewhere."""
        return all(norm < float("inf") for norm in (self.weight, self.update, self.error))


@torch.no_grad()
def fold_in(adapters: Sequence[Adapter], base: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight and what adapters add to it, summed in at least fp32 and rounded once.

    Args:
        adapters: Act one after the other.
        base: ``(out_features, in_features)``, of floating point.
        dtype: Of the result.
    """
    stored = _like(base, dtype)
    for rows in _blocks(base):
        _fold_rows(adapters, base, rows, stored)
    return stored


@torch.no_grad()
def fold_and_measure(
    adapters: Sequence[Adapter], base: Tensor, dtype: torch.dtype, *, instead: Tensor | None = None
) -> Folded:
    """:func:`fold_in` with its proof.

    Args:
        adapters: As in :func:`fold_in`.
        base: As in :func:`fold_in`.
        dtype: As in :func:`fold_in`.
        instead: What is stored in the place of the sum: what codes made of it stand for.
    """
    norms: list[Tensor] = []
    stored = _like(base, dtype)
    for rows in _blocks(base):
        norms += _measured_rows(adapters, base, rows, stored, instead)
    return Folded(stored, *_joined(norms))


def _measured_rows(
    adapters: Sequence[Adapter], base: Tensor, rows: slice, stored: Tensor, instead: Tensor | None
) -> list[Tensor]:
    """Write some rows of ``stored``, and return the three norms of them."""
    weight, update = _fold_rows(adapters, base, rows, stored)
    if instead is not None:
        stored[rows] = instead[rows]
    # The difference of two close floating-point numbers is exact (Sterbenz), so fp32 shows the rounding of fp32.
    error = (stored[rows].to(weight.dtype) - weight).sub_(update)
    return [torch.linalg.vector_norm(values) for values in (weight, update, error)]


def _like(base: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(base, dtype=dtype)  # a transposed weight stays one


def _fold_rows(adapters: Sequence[Adapter], base: Tensor, rows: slice, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Write some rows of ``stored``; returns the weight and its update there, in at least fp32."""
    weight = base[rows].to(torch.promote_types(torch.float32, base.dtype))
    update = update_of(adapters, weight, rows)
    torch.add(weight, update, out=stored[rows])
    return weight, update


def _blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    values = _BLOCK if matrix.device.type == "cpu" else _LARGE_BLOCK
    step = max(1, values // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _joined(norms: list[Tensor]) -> list[float]:
    """Three norms of a whole from those of its parts, in turn."""
    if not norms:
        return [0.0, 0.0, 0.0]
    parts = torch.stack(norms).cpu().to(torch.float64).view(-1, 3)  # first to the CPU: MPS has no float64
    joined: list[float] = torch.linalg.vector_norm(parts, dim=0).tolist()
    return joined
