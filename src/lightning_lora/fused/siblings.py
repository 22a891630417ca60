"""Layers that get the very same input, one after the other, such as q, k and v: one gradient of it instead of a sum.

Autograd adds up what the layers return for their common input, out of place. Here the first layer leaves a stand-in for
the input to the second, and so on: the gradient of the stand-in arrives at the layer before, which accumulates its own
part onto it, in place. Under autocast the stand-in is the input that was cast already.

A stand-in holds on to the graph that it is part of. The next call of any layer takes it or throws it away, and the last
layer of a parent leaves none, so that nothing of a forward pass stays.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class _Left(NamedTuple):
    """What the layer that was called last left."""

    input: weakref.ref[Tensor]
    version: int
    stand_in: Tensor


_left = threading.local()


def take_stand_in(input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The stand-in for ``input`` in ``dtype``, if the layer before got the same input and left one."""
    left: _Left | None = getattr(_left, "value", None)
    _left.value = None
    if left is None or left.input() is not input or left.version != input._version:
        return None
    return left.stand_in if left.stand_in.dtype == dtype else None


def leave_stand_in(input: Tensor, stand_in: Tensor) -> None:
    """Leave a stand-in for ``input`` to the next layer."""
    _left.value = _Left(weakref.ref(input), input._version, stand_in)


def forget_stand_in() -> None:
    """Throw away what is left."""
    _left.value = None


def is_left() -> bool:
    """Whether a stand-in waits for the next layer."""
    return getattr(_left, "value", None) is not None
