"""Layers that get the very same input, one after the other, such as q, k and v: one gradient of it instead of a sum.

Autograd adds up what the layers return for their common input, out of place. Here the first layer hands a stand-in for
the input to the second, and so on: the gradient of the stand-in arrives at the layer before, which accumulates its own
part onto it, in place. Under autocast the stand-in is the input that was cast already.

Which layer is followed by a sibling is learned as a module runs: only such a one leaves a stand-in, and the next call
of any layer takes it or throws it away, so that none outlives its forward pass.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Left(NamedTuple):
    """What the layer that was called last left."""

    layer: weakref.ref[nn.Module]
    input: weakref.ref[Tensor]
    version: int
    stand_in: Tensor | None


_followed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_left = threading.local()


def take_stand_in(input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The stand-in for ``input`` in ``dtype`` that the layer before left, if it got the same input."""
    left: _Left | None = getattr(_left, "value", None)
    _left.value = None
    if left is None:
        return None
    layer = left.layer()
    is_same = left.input() is input and left.version == input._version
    if layer is not None and is_same != (layer in _followed):
        _followed.add(layer) if is_same else _followed.discard(layer)
    stand_in = left.stand_in
    return stand_in if is_same and stand_in is not None and stand_in.dtype == dtype else None


def is_followed(layer: nn.Module) -> bool:
    """Whether the layer that was called after this one got the same input, the last time."""
    return layer in _followed


def leave(layer: nn.Module, input: Tensor, stand_in: Tensor | None) -> None:
    """Note for the next layer what this one got, and its stand-in."""
    _left.value = _Left(weakref.ref(layer), weakref.ref(input), input._version, stand_in)
