"""Which training examples share a batch, and how they lie in its rows: functions by name, in ``BATCHING``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_lora.sft.encoding import Batch, Encoded, collate, collate_packed

Batching = Callable[[Sequence[Encoded], int, int], list[Batch]]


def by_length(encoded: Sequence[Encoded], batch_size: int, pad_id: int) -> list[Batch]:
    """Examples of like length, one a row: next to no padding, and batches that are not drawn at random."""
    return as_drawn(sorted(encoded, key=len), batch_size, pad_id)


def as_drawn(encoded: Sequence[Encoded], batch_size: int, pad_id: int) -> list[Batch]:
    """Examples in their order, one a row, padded to the longest."""
    return [collate(rows, pad_id=pad_id) for rows in _in_turn(encoded, batch_size)]


def packed(encoded: Sequence[Encoded], batch_size: int, pad_id: int) -> list[Batch]:
    """Examples in their order, several in a row, where they don't see each other: next to no padding."""
    return [collate_packed(pack(rows), pad_id=pad_id) for rows in _in_turn(encoded, batch_size)]


BATCHING: dict[str, Batching] = {"by_length": by_length, "as_drawn": as_drawn, "packed": packed}


def pack(encoded: Sequence[Encoded]) -> list[list[Encoded]]:
    """Put examples into rows of about the same length, two to four times that of the longest example.

    Shorter rows waste more, and the attention of longer ones costs more.
    """
    total, longest = sum(map(len, encoded)), max(map(len, encoded))
    counts = range(math.ceil(total / (4 * longest)), math.ceil(total / (2 * longest)) + 1)
    return min((_spread(encoded, count) for count in counts), key=lambda rows: len(rows) * max(map(_length, rows)))


def _spread(encoded: Sequence[Encoded], count: int) -> list[list[Encoded]]:
    """Always the longest example that is left into the emptiest row."""
    rows: list[list[Encoded]] = [[] for _ in range(count)]
    for example in sorted(encoded, key=len, reverse=True):
        min(rows, key=_length).append(example)
    return rows


def _length(row: Sequence[Encoded]) -> int:
    return sum(map(len, row))


def _in_turn(encoded: Sequence[Encoded], batch_size: int) -> list[Sequence[Encoded]]:
    return [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
