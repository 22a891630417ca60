"""Wordings and values that are kept apart for training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Wordings or values of one meaning, apart for each split."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        """Return the wordings of ``"train"``, ``"validation"`` or ``"test"``."""
        wordings: tuple[str, ...] = getattr(self, split)
        return wordings


def pool(train: str, validation: str, test: str) -> Pool:
    """Read three lists of wordings parted by ``|``."""

    def parts(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split("|") if part.strip())

    return Pool(train=parts(train), validation=parts(validation), test=parts(test))
