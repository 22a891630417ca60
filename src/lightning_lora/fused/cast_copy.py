"""A frozen weight in autocast's dtype, cast once instead of in each forward pass.

Autocast keeps the casts of leaves that require gradients alone
(https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/autocast_mode.cpp, ``cached_cast``), so a frozen fp32
weight is cast in every pass. The forward pass of a training step without recomputation holds the casts of all layers
when it ends anyway, so a step of one forward and one backward pass has the same peak with copies that stay. Of a layer
whose activations are recomputed or moved away to save memory, no copy is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Source(NamedTuple):
    """What values were cast. While one of these lives, no other storage can get the address of its storage."""

    storage: StorageWeakRef
    address: int
    shape: torch.Size
    strides: tuple[int, ...]
    version: int


def _source_of(weight: Tensor) -> _Source:
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    return _Source(storage, weight.data_ptr(), weight.shape, weight.stride(), weight._version)


class CastCopy:
    """The copy of one weight, made anew when the weight is another one or was written to.

    What autograd can't see either is not seen: a write in place through ``weight.data`` or numpy. The callback drops
    the copies before each validation and with the first batch of an epoch.
    """

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._source: _Source | None = None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` in ``dtype``, from the copy where there is one or one may be kept."""
        if torch.is_inference(weight):  # has no version
            return weight.to(dtype)
        if self._copy is not None and self._copy.dtype == dtype and self._source == _source_of(weight):
            return self._copy
        self.drop()
        cast = weight.detach().to(dtype)
        if may_keep():
            self._copy, self._source = cast, _source_of(weight)
        return cast

    @property
    def kept(self) -> Tensor | None:
        """The copy, if there is one."""
        return self._copy

    def drop(self) -> None:
        """Give the memory back."""
        self._copy = self._source = None

    def __deepcopy__(self, memo: Any) -> CastCopy:
        return CastCopy()

    def __reduce__(self) -> tuple[type[CastCopy], tuple[()]]:
        return CastCopy, ()


def may_keep() -> bool:
    """Whether the pass is a forward pass of training that keeps its activations in place."""
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and torch._C._current_graph_task_id() == -1  # not within a backward pass, which recomputes
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # checkpoint(), save_on_cpu()
    )
