"""The arguments of a block, for its first run and for the later ones."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_lora.errors import UnsupportedSetupError

# Their update() puts new tensors in the place of the old ones; other layers write into theirs.
_REPLAYABLE = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")


class Arguments:
    """Arguments of one call: the first run gets the user's own objects, later runs what these held before it.

    A block may change a dict, a list or a key-value cache that it is passed; the tensors inside are shared.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._first: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        leaves, self._structure = tree_flatten((args, kwargs), is_leaf=_is_leaf)
        self._leaves = [ReplayedCache(leaf) if is_cache(leaf) else leaf for leaf in leaves]

    def take_leaves(self) -> list[Any]:
        """Everything inside of dicts, lists and tuples, once: who keeps it may want to move the tensors elsewhere."""
        leaves, self._leaves = self._leaves, []
        return leaves

    def of_run(self, leaves: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the next run, from its leaves."""
        first, self._first = self._first, None
        if first is not None:
            return first
        copies = [leaf.again() if isinstance(leaf, ReplayedCache) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(copies, self._structure)
        return args, kwargs


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, (dict, list, tuple))  # torch and transformers have registered other classes


class ReplayedCache:
    """A key-value cache of transformers that a block writes to."""

    def __init__(self, cache: Any) -> None:
        self._before = _snapshot(cache)

    def again(self) -> Any:
        """A copy of what it was."""
        return _snapshot(self._before)


def is_cache(value: Any) -> bool:
    """Whether this is a key-value cache; transformers is not imported to recognise it."""
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
