"""Block lists, and which blocks of them a ``layers`` setting means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_lora.class_swap import original_class

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class BlockLists:
    """The repeated blocks of a module: lists in which at least two entries hold candidate layers.

    Where lists are nested (experts inside blocks), the outermost one counts.

    Args:
        module: The root that dotted names start from.
        candidates: Dotted names of the layers that may be adapted.
        alike: Whether an ``nn.Sequential`` counts only if these entries are of one class, so that a chain of a stem, a
            stack and a head is no list of blocks.
    """

    def __init__(self, module: nn.Module, candidates: Iterable[str], *, alike: bool = False) -> None:
        self._lists: dict[str, dict[int, set[str]]] = {}
        lengths: dict[str, int] = {}
        for candidate in candidates:
            parts = candidate.split(".")
            for end in range(len(parts)):
                name = ".".join(parts[:end])
                container = module.get_submodule(name)
                if isinstance(container, _CONTAINERS) and parts[end].isdigit():
                    self._lists.setdefault(name, {}).setdefault(int(parts[end]), set()).add(candidate)
                    lengths[name] = len(container)
        self._lengths = lengths
        repeated = {
            name
            for name, blocks in self._lists.items()
            if len(blocks) >= 2 and (not alike or _are_alike(module.get_submodule(name), blocks))
        }
        inner = {name for name in repeated for other in repeated if name != other and _is_inside(name, other)}
        self._lists = {name: self._lists[name] for name in sorted(repeated - inner)}

    @property
    def block_names(self) -> set[str]:
        """Dotted names of all blocks that hold candidates."""
        return {_join(name, index) for name, blocks in self._lists.items() for index in blocks}

    def describe(self) -> str:
        """The lists and their lengths, for a message."""
        return ", ".join(f"{name or '(the module itself)'} with {self._lengths[name]} blocks" for name in self._lists)

    def select(self, layers: tuple[str | int, ...]) -> set[str]:
        """Names of the candidate layers in the blocks that ``layers`` means, over all lists.

        Raises:
            ValueError: If there is no block list, an entry of ``layers`` is not understood, or an entry names no
                block with a candidate.
        """
        if not self._lists:
            raise ValueError("layers is set, but the module has no list of repeated blocks that hold target layers.")
        chosen: set[str] = set()
        longest = max(self._lengths[name] for name in self._lists)
        for entry in layers:
            found = {
                layer
                for name, blocks in self._lists.items()
                for index in _indices(entry, sorted(blocks), self._lengths[name], longest)
                for layer in blocks.get(index, ())
            }
            if not found:
                raise ValueError(f"layers entry {entry!r} selects no target layer; there is {self.describe()}.")
            chosen |= found
        return chosen


def _indices(entry: str | int, holding: list[int], length: int, longest: int) -> list[int]:
    """Indices that one entry of ``layers`` means in a list of ``length`` blocks, of which ``holding`` hold targets."""
    if isinstance(entry, int):
        return [entry + length if entry < 0 else entry]
    if entry == "last-half":
        return holding[len(holding) // 2 :]
    if entry == "every-other":
        return holding[::2]
    if re.fullmatch(r"\s*-?\d+\s*", entry):
        return _indices(int(entry), holding, length, longest)
    bounds = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", entry)
    if bounds is None or int(bounds[1]) > int(bounds[2]):
        raise ValueError(
            f'layers entry {entry!r} is not understood: use an index, an inclusive range such as "4-7", '
            '"last-half" or "every-other".'
        )
    if int(bounds[2]) >= longest:
        raise ValueError(f"layers entry {entry!r} goes past the last block, which is number {longest - 1}.")
    return list(range(int(bounds[1]), int(bounds[2]) + 1))


def _are_alike(container: nn.Module, indices: Iterable[int]) -> bool:
    if not isinstance(container, nn.Sequential):
        return True
    return len({original_class(container[index]) for index in indices}) == 1


def _is_inside(name: str, other: str) -> bool:
    return other == "" or name.startswith(other + ".")


def _join(name: str, index: int) -> str:
    return f"{name}.{index}" if name else str(index)
