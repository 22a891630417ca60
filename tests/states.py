"""What a module or a checkpoint file holds, and whether two of them are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def read(path: Any) -> dict[str, Any]:
    """A checkpoint, opened as safely as torch can."""
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def adapters_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if ".adapters." in key}


def base_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if ".adapters." not in key}


def same(a: Any, b: Any) -> bool:
    """Whether two nests of plain values and tensors are equal bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
