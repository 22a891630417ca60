"""Find the repeated blocks of any module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.class_swap import original_class
from lightning_lora.layers import host_of

NamedBlock = tuple[str, nn.Module]
_LISTS = (nn.ModuleList, nn.Sequential)


def repeated_blocks(root: nn.Module) -> list[NamedBlock]:
    """The blocks of which ``root`` is a stack, with their dotted names, in module order.

    A block is a layer that transformers itself would checkpoint, or an entry of a list (``nn.ModuleList``,
    ``nn.Sequential``) that has another entry of its kind: of its class, or, of plain lists, of what they hold. So a
    chain of a stem, a stack and a head is no list of blocks. The outermost list counts, except where its entries are
    stages: each a list of blocks itself, all of different widths or depths. Where there is no block, each
    ``nn.Sequential`` that repeats single layers (a plain MLP) is one, if there are several: a single one would hold
    all activations at once while it is recomputed.
    """
    blocks = _blocks(root, "")
    chains = [] if blocks else _plain_chains(root, "")
    return blocks or (chains if len(chains) >= 2 else [])


def is_single_layer(module: nn.Module) -> bool:
    """Whether this is one layer, adapted or not: it keeps little but its input, which recomputation keeps, too."""
    if host_of(module) is not None or isinstance(module, Adapter):
        return True
    is_of_torch = original_class(module).__module__.startswith("torch.nn.modules.")
    return is_of_torch and not isinstance(module, nn.RNNBase) and next(module.children(), None) is None


def is_checkpoint_wrapper(module: nn.Module) -> bool:
    """Whether this is torch's own wrapper of a block that it recomputes; its module is private."""
    return any(cls.__name__ == "CheckpointWrapper" for cls in type(module).__mro__)


def _blocks(module: nn.Module, name: str, *, in_stage: bool = False) -> list[NamedBlock]:
    if is_single_layer(module):
        return []
    if is_checkpoint_wrapper(module) or _is_of_transformers(module):
        return [(name, module)]
    children = list(_children(module, name))
    entries = _repeated(children) if isinstance(module, _LISTS) else []
    stages = _are_stages(entries, in_stage=in_stage)
    in_stage = in_stage or stages
    blocks: list[NamedBlock] = []
    for path, child in children:
        is_block = (path, child) in entries and not stages
        blocks += [(path, child)] if is_block else _blocks(child, path, in_stage=in_stage)
    return blocks


def _plain_chains(module: nn.Module, name: str) -> list[NamedBlock]:
    if is_single_layer(module):
        return []
    if isinstance(module, nn.Sequential):
        kinds = Counter(original_class(child) for child in module if next(child.parameters(), None) is not None)
        if max(kinds.values(), default=0) >= 2:
            return [(name, module)]
    return [block for path, child in _children(module, name) for block in _plain_chains(child, path)]


def _children(module: nn.Module, name: str) -> Iterator[NamedBlock]:
    for key, child in module.named_children():
        yield f"{name}.{key}" if name else key, child


def _is_composite(module: nn.Module) -> bool:
    return not is_single_layer(module) and next(module.parameters(), None) is not None


def _repeated(children: list[NamedBlock]) -> list[NamedBlock]:
    entries = [(path, child) for path, child in children if _is_composite(child)]
    kinds = Counter(_kind(entry) for _, entry in entries)
    return [(path, entry) for path, entry in entries if kinds[_kind(entry)] >= 2]


def _kind(module: nn.Module) -> object:
    """What two entries of a list share: their class; of two plain lists, which all are of one class, what they hold."""
    return tuple(map(_kind, module.children())) if type(module) in _LISTS else original_class(module)


def _are_stages(entries: list[NamedBlock], *, in_stage: bool) -> bool:
    """Whether the entries only group the blocks proper; a block may hold a list, too, such as experts."""
    inner = [_blocks(entry, "", in_stage=True) for _, entry in entries]
    if any(_is_of_transformers(block) for blocks in inner for _, block in blocks):
        return True
    if not inner or not all(inner):
        return False
    plain = all(type(entry) in _LISTS for _, entry in entries)
    differ = len({_structure(entry) for _, entry in entries}) == len(entries)
    # A stage's first block differs from the others, too: it changes the width.
    return plain or (differ and not in_stage)


def _structure(module: nn.Module) -> tuple[object, ...]:
    """Names, classes and parameter shapes of all layers inside, without adapters, which not all blocks need have."""
    return tuple(
        (name, original_class(child), *(tuple(p.shape) for p in child.parameters(recurse=False)))
        for name, child in module.named_modules()
        if not isinstance(child, Adapter) and next(child.parameters(recurse=False), None) is not None
    )


def _is_of_transformers(module: nn.Module) -> bool:
    """Whether transformers would checkpoint this layer; transformers is not imported to recognise its class."""
    return any(
        cls.__module__ == "transformers.modeling_layers" and cls.__name__ == "GradientCheckpointingLayer"
        for cls in type(module).__mro__
    )
