"""How right JSON answers are: do they parse, how many fields are right, is everything right.

All three read strings and are strict: an answer counts as JSON only if the whole of it is one JSON object.
Prose around it, a key given twice, or NaN make it invalid, as they would for the program at the other end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torchmetrics import Metric


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that the whole text is, or None."""
    try:
        parsed = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def field_pairs(value: Any, path: str = "") -> Counter[tuple[str, str]]:
    """Return the (key path, value) pairs of a JSON value, counted.

    Each element of a list is a pair of its own, in any order. Null and empty containers are no pairs: they
    say that there is nothing.
    """
    if isinstance(value, dict):
        parts = [field_pairs(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [field_pairs(item, path) for item in value]
    else:
        return Counter() if value is None else Counter({(path, json.dumps(value)): 1})
    return sum(parts, Counter())


class _AnswerMetric(Metric):
    """A share of summed counts; both sums are exact and add up over batches and processes."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: torch.Tensor
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", default=torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> torch.Tensor:
        """Return the share in [0, 1]; 0 before any update."""
        return self.right / self.total.clamp(min=1)


class ValidJSON(_AnswerMetric):
    """Share of answers that are one JSON object and nothing else."""

    def update(self, answers: Sequence[str]) -> None:
        """Count a batch of answers."""
        self.right += sum(parse_object(answer) is not None for answer in answers)
        self.total += len(answers)


class ExactMatch(_AnswerMetric):
    """Share of answers equal to the expected object; the order of keys and white space don't matter."""

    def update(self, answers: Sequence[str], expected: Sequence[str]) -> None:
        """Count a batch of answers against what was expected."""
        self.right += sum(_same_object(answer, wanted) for answer, wanted in zip(answers, expected, strict=True))
        self.total += len(answers)


class FieldF1(_AnswerMetric):
    """Micro F1 over (key, value) pairs that are exactly right; an answer that is no object has none."""

    def update(self, answers: Sequence[str], expected: Sequence[str]) -> None:
        """Count the pairs of a batch of answers against what was expected."""
        for answer, wanted in zip(answers, expected, strict=True):
            given, right = field_pairs(parse_object(answer)), field_pairs(parse_object(wanted))
            self.right += 2 * (given & right).total()
            self.total += given.total() + right.total()


def _same_object(answer: str, wanted: str) -> bool:
    parsed = parse_object(answer)
    # Compared as text, because Python holds 1, 1.0 and true for equal.
    return parsed is not None and _canonical(parsed) == _canonical(parse_object(wanted))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
