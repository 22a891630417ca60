"""What a recomputation must find as the first run found it, and must not change a second time."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.errors import UnsupportedSetupError

# Their update() puts new tensors in the place of the old ones; other layers write into theirs.
_REPLAYABLE = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")


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
