"""What a recomputation must find as the first run found it, and must not change a second time."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.errors import UnsupportedSetupError

# Their update() puts new tensors in the place of the old ones; other layers write into theirs.
_REPLAYABLE = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")


class SecondRun:
    """Context of a recomputation; may be entered again."""

    def __init__(self, block: nn.Module) -> None:
        self._contexts = (KeptStatistics(updating_norms(block)), KeptAttention())

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


class KeptStatistics:
    """Context in which norm layers update copies of their running statistics; may be entered again.

    BatchNorm in train mode updates its statistics whenever it runs. They are no input of what it computes, so that a
    recomputation with copies computes the same.
    """

    def __init__(self, norms: list[nn.Module]) -> None:
        self._norms = norms
        self._buffers: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._buffers = [dict(norm._buffers) for norm in self._norms]
        for norm, buffers in zip(self._norms, self._buffers, strict=True):
            norm._buffers.update({key: value.clone() for key, value in buffers.items() if value is not None})

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self._norms, self._buffers, strict=True):
            norm._buffers.update(buffers)


def updating_norms(block: nn.Module) -> list[nn.Module]:
    """The norm layers inside ``block`` whose running statistics its next call changes."""
    return [child for child in block.modules() if _updates_statistics(child)]


def _updates_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


class KeptAttention:
    """Context in which attention uses the kernels that were allowed when this was made; may be entered again.

    A training step that runs within ``sdpa_kernel(...)`` has left it when Lightning calls backward. torch's checkpoint
    brings autocast back for the recomputation, and nothing else.
    """

    def __init__(self) -> None:
        self._allowed = _allowed_kernels()
        self._context: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._context = nullcontext() if _allowed_kernels() == self._allowed else sdpa_kernel(self._allowed)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _allowed_kernels() -> list[SDPBackend]:
    cuda: Any = torch.backends.cuda  # whose flags hold for the CPU, too
    allowed = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, is_allowed in allowed.items() if is_allowed]


class ReplayedCache:
    """A key-value cache of transformers that a block writes to: each recomputation gets it as it was before."""

    def __init__(self, cache: Any) -> None:
        self._before = _snapshot(cache)
        self._first: Any = cache

    def take(self) -> Any:
        """The cache itself for the first run, a copy of what it was for every later one."""
        cache, self._first = self._first, None
        return cache if cache is not None else _snapshot(self._before)


def is_cache(value: Any) -> bool:
    """Whether this is a key-value cache; transformers is not imported to recognise it."""
    # The first half spares torch.compile the classes of plain values, at which it would break the graph.
    return hasattr(value, "get_seq_length") and any(
        cls.__module__ == "transformers.cache_utils" and cls.__name__ == "Cache" for cls in type(value).__mro__
    )


def _snapshot(cache: Any) -> Any:
    """A copy that shares its tensors with ``cache``, and nothing that an update would change."""
    _require_replayable(cache)
    twin = copy.copy(cache)
    for key, value in vars(cache).items():
        if is_cache(value):
            vars(twin)[key] = _snapshot(value)
        elif isinstance(value, list):
            vars(twin)[key] = [copy.copy(item) for item in value]
        elif isinstance(value, dict):
            vars(twin)[key] = dict(value)
    return twin


def _require_replayable(cache: Any) -> None:
    parts = [type(layer).__name__ for layer in vars(cache).get("layers", ())]
    is_known = "layers" in vars(cache) or any(map(is_cache, vars(cache).values()))
    foreign = [part for part in parts if part not in _REPLAYABLE]
    if foreign or not is_known:
        raise UnsupportedSetupError(
            f"gradient checkpointing runs each block twice, and a {type(cache).__name__} "
            f"({', '.join(sorted(set(parts)))}) changes in place when it does. Train with use_cache=False, or with a "
            "DynamicCache."
        )
