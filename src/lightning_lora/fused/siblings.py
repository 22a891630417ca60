"""From one layer to the next: what those share that get the very same input, one after the other, such as q, k and v.

What is left holds on to the graph that it is part of. The next call of any layer takes it or throws it away, and the
last layer of a parent leaves nothing, so that nothing of a forward pass stays, unless the last layer that is called has
one of its width after it in its parent: then it stays until the next pass, or until the callback forgets it after the
backward pass.
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
    hooks: object
    joint: Joint


_left = threading.local()


def take_joint(input: Tensor, dtype: torch.dtype) -> Joint | None:
    """What the layer before left, if its input, the dtype of its product and what looks at saved tensors were the same.

    Else a checkpoint around one of the layers would save one thing in the first run and another in the second.
    """
    left: _Left | None = getattr(_left, "value", None)
    _left.value = None
    if left is None or left.input() is not input or left.version != input._version:
        return None
    stand_in = left.joint.input
    fits = stand_in.dtype == dtype and stand_in.requires_grad == input.requires_grad and left.hooks == _hooks()
    return left.joint if fits and may_share(left.joint.dropout) else None


def leave_joint(input: Tensor, joint: Joint) -> None:
    """Leave what layers with this input share to the next one."""
    _left.value = _Left(weakref.ref(input), input._version, _hooks(), joint)


def may_share(dropout: float) -> bool:
    """Whether layers may share anything here.

    A reentrant checkpoint runs without recording first, around one layer or around all of them: which, only the second
    run shows. A mask that was shared in one and not in the other would give wrong gradients, so none is in either. In
    other checkpoints both runs have hooks on what is saved, the same for all layers inside.
    """
    if not torch.is_grad_enabled():
        return False
    in_backward = torch._C._current_graph_task_id() != -1
    return dropout == 0.0 or not in_backward or _is_checkpoints(_hooks())


def _hooks() -> object:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _is_checkpoints(hooks: object) -> bool:
    return isinstance(hooks, tuple) and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def forget_joint() -> None:
    """Throw away what waits for the next layer."""
    _left.value = None


def is_left() -> bool:
    """Whether something waits for the next layer."""
    return getattr(_left, "value", None) is not None
