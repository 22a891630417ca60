"""The blocks that a config means."""

from __future__ import annotations

from torch import nn

from lightning_lora.errors import TargetNotFoundError
from lightning_lora.gradient_checkpointing.config import GradientCheckpointingConfig
from lightning_lora.gradient_checkpointing.repeated import NamedBlock, is_single_layer, repeated_blocks
from lightning_lora.targets.patterns import Pattern

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


def select_blocks(module: nn.Module, config: GradientCheckpointingConfig, *, strict: bool) -> list[NamedBlock]:
    """All blocks, before ``every_n``: in module order, none inside another, a shared one once.

    Raises:
        TargetNotFoundError: If there is no repeated block, or a pattern matches none; not if ``strict`` is False.
    """
    blocks = _named(module, config.patterns, strict=strict) if config.patterns else repeated_blocks(module)
    if strict and not blocks:
        raise TargetNotFoundError(
            f"gradient checkpointing: {type(module).__name__} has no list of repeated blocks. Name what is to be "
            'recomputed, such as GradientCheckpointingConfig(blocks=("encoder", "decoder.*.mlp")); '
            "of one long chain of layers, make several nn.Sequential."
        )
    inside = {id(child) for _, block in blocks for child in block.modules() if child is not block}
    chosen: dict[int, NamedBlock] = {}
    for name, block in blocks:
        if id(block) not in inside:
            chosen.setdefault(id(block), (name, block))
    return list(chosen.values())


def _named(module: nn.Module, patterns: tuple[str, ...], *, strict: bool) -> list[NamedBlock]:
    modules = dict(module.named_modules(remove_duplicate=False))
    blocks = {name for name, child in modules.items() if name and _can_be_recomputed(child)}
    chosen: set[str] = set()
    for text in patterns:
        pattern = Pattern(text)
        matched = {name for name in modules if name and pattern.matches(name)}
        found = {block for name in matched for block in _callable_parts(name, modules[name])} & blocks
        if strict and not found:
            raise TargetNotFoundError(_not_found(pattern, matched, blocks))
        chosen |= found
    return [(name, child) for name, child in modules.items() if name in chosen]


def _callable_parts(name: str, module: nn.Module) -> list[str]:
    """The name itself, or those of the entries where the module is only a list that nobody calls."""
    if not isinstance(module, _WITHOUT_FORWARD):
        return [name]
    return [part for key, child in module.named_children() for part in _callable_parts(f"{name}.{key}", child)]


def _can_be_recomputed(module: nn.Module) -> bool:
    return not is_single_layer(module) and type(module).forward is not nn.Module.forward


def _not_found(pattern: Pattern, matched: set[str], blocks: set[str]) -> str:
    if matched:
        return (
            f"blocks: {pattern.text!r} matches only single layers, such as {min(matched)!r}, of which recomputation "
            "frees nothing: they keep little but their input. Name the blocks that hold them."
        )
    nearest = ", ".join(map(repr, pattern.nearest(blocks))) or "none"
    return f"blocks: {pattern.text!r} matches no block. Closest: {nearest}."
