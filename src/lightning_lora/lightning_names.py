"""Recognise Lightning's classes by their names.

The same classes come from two distributions, ``lightning`` (``lightning.pytorch``) and ``pytorch_lightning``, which an
``isinstance`` would tell apart; and not every version has each of them.
"""

from __future__ import annotations

from typing import Any


def is_a(value: Any, *names: str) -> bool:
    """Whether the class of ``value``, or one that it derives from, has one of these names.

    Example:
        >>> is_a(True, "int", "str")
        True
    """
    return any(cls.__name__ in names for cls in type(value).__mro__)
