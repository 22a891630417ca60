"""Layers that get the very same input, one after the other, such as q, k and v: one gradient of it instead of a sum.

Autograd adds up what the layers return for their common input, out of place. Here the first layer leaves a stand-in for
the input to the second, and so on: the gradient of the stand-in arrives at the layer before, which accumulates its own
part onto it, in place. Under autocast the stand-in is the input that was cast already.

A stand-in lives as long as the output of its layer, so that a forward pass without a backward leaves nothing behind. It
is there from the first call on: a resumed run computes what one that never stopped does, to the bit.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Left(NamedTuple):
    """What the layer that was called last left."""

    input: weakref.ref[Tensor]
    version: int
    stand_in: weakref.ref[Tensor]


_left = threading.local()
_of_output = WeakTensorKeyDictionary()


def take_stand_in(input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The stand-in for ``input`` in ``dtype``, if the layer before got the same input."""
    left: _Left | None = getattr(_left, "value", None)
    _left.value = None
    if left is None or left.input() is not input or left.version != input._version:
        return None
    stand_in = left.stand_in()
    return stand_in if stand_in is not None and stand_in.dtype == dtype else None


def leave_stand_in(input: Tensor, stand_in: Tensor, output: Tensor) -> None:
    """Leave a stand-in for ``input`` to the next layer, for as long as ``output`` lives."""
    _of_output[output] = stand_in
    _left.value = _Left(weakref.ref(input), input._version, weakref.ref(stand_in))
