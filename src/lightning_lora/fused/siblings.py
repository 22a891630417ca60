"""From one layer to the next: what those share that get the very same input, one after the other, such as q, k and v.

What is left holds on to the graph that it is part of. The next call of any layer takes it or throws it away, and the
last layer of a parent leaves nothing, so that nothing of a forward pass stays.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.fused.joint import Joint


class _Left(NamedTuple):
    """What the layer that was called last left."""

    input: weakref.ref[Tensor]
    version: int
    records: bool
    joint: Joint


_left = threading.local()


def take_joint(input: Tensor, dtype: torch.dtype) -> Joint | None:
    """What the layer before left, if its input, the dtype and the recording of gradients were the same."""
    left: _Left | None = getattr(_left, "value", None)
    _left.value = None
    if left is None or left.input() is not input or left.version != input._version:
        return None
    return left.joint if left.joint.input.dtype == dtype and left.records == torch.is_grad_enabled() else None


def leave_joint(input: Tensor, joint: Joint) -> None:
    """Leave what layers with this input share to the next one."""
    _left.value = _Left(weakref.ref(input), input._version, torch.is_grad_enabled(), joint)


def is_left() -> bool:
    """Whether something waits for the next layer."""
    return getattr(_left, "value", None) is not None
