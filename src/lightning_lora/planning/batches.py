"""The batch that a plan is made for: token ids of a size, or an example of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_lora.planning.weightless import LARGEST_KNOWN


@dataclass(frozen=True)
class TokenBatch:
    """Token ids ``(size, length)`` without padding, int64, as a language model gets them.

    Attributes:
        size: Sequences in one batch, of one device and one backward pass.
        length: Tokens of each sequence.

    Raises:
        ValueError: If one of them is not a positive integer.
    """

    size: int = 1
    length: int = 512

    def __post_init__(self) -> None:
        for field in ("size", "length"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TokenBatch.{field} must be an integer of at least 1, got {value!r}.")

    def __str__(self) -> str:
        return f"{self.size} x {self.length} tokens"


def as_batch(value: Any) -> Any:
    """Accept ``(size, length)`` for a :class:`TokenBatch`; anything else is an example batch.

    It stays what it is, but for mappings that are no dict (``BatchEncoding``), of which pytree sees no tensors.
    """
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return dict(value)
    numbers = isinstance(value, (tuple, list)) and len(value) == 2 and all(type(item) is int for item in value)
    return TokenBatch(*value) if numbers else value


def batch_size(batch: Any) -> int:
    """Rows of a batch: of an example, the length of the first dimension of its first tensor.

    Raises:
        ValueError: If there is no tensor with a dimension.
    """
    if isinstance(batch, TokenBatch):
        return batch.size
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise ValueError("the example batch holds no tensor with a batch dimension, so its size cannot be changed.")


def resized(batch: Any, size: int) -> Any:
    """The batch with ``size`` rows: every tensor whose first dimension is the batch's gets that many.

    No memory is taken for floating-point tensors, nor for integers too many to be known.
    """
    if isinstance(batch, TokenBatch):
        return replace(batch, size=size)
    rows = batch_size(batch)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != rows:
            return leaf
        shape = (size, *leaf.shape[1:])
        if leaf.is_meta or leaf.is_floating_point() or math.prod(shape) > LARGEST_KNOWN:
            return torch.empty(shape, dtype=leaf.dtype, device="meta")
        # Rows repeat, and values are those of the example: labels stay in their range.
        return leaf[torch.arange(size) % rows]

    return pytree.tree_map(resize, batch)


def lengthened(batch: Any, length: int) -> TokenBatch:
    """The batch with sequences of ``length`` tokens.

    Raises:
        ValueError: If it is an example batch: which dimension is the sequence's is not known.
    """
    if not isinstance(batch, TokenBatch):
        raise ValueError("only a TokenBatch(size, length) has a length to search; plan with one, or search the batch.")
    return replace(batch, length=length)


def describe(batch: Any) -> str:
    """One line for a report."""
    if isinstance(batch, TokenBatch):
        return str(batch)
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return ", ".join(map(str, shapes[:4])) + (" ..." if len(shapes) > 4 else "")


def example_of(batch: Any, dtype: torch.dtype | None) -> Any:
    """What the step gets: a :class:`TokenBatch` as a dict with ``input_ids`` and ``labels``; an example on the CPU.

    Args:
        batch: The batch.
        dtype: Of floating-point tensors; None: their own. Lightning's bf16-true casts the inputs, too.
    """
    if isinstance(batch, TokenBatch):
        tokens = torch.zeros((), dtype=torch.int64).expand(batch.size, batch.length)  # one number
        return {"input_ids": tokens, "labels": tokens}

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.empty(leaf.shape, dtype=dtype or leaf.dtype, device="meta")
        return leaf if not isinstance(leaf, Tensor) or leaf.is_meta else leaf.detach().cpu()

    return pytree.tree_map(convert, batch)


def is_mapping(batch: Any) -> bool:
    """Whether the batch goes to the module by names."""
    return isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__"))
