"""Turn gradient checkpointing on and off."""

from __future__ import annotations

from typing import Literal, overload

from torch import nn

from lightning_lora.class_swap import original_class
from lightning_lora.gradient_checkpointing.config import GradientCheckpointingConfig
from lightning_lora.gradient_checkpointing.models import give_back_own, skip_caches, turn_off_own, unskip_caches
from lightning_lora.gradient_checkpointing.recompute import Called, recomputed_forward
from lightning_lora.gradient_checkpointing.repeated import is_checkpoint_wrapper
from lightning_lora.gradient_checkpointing.report import (
    KEPT,
    LEFT,
    OFFLOADED,
    RECOMPUTED,
    BlockRow,
    GradientCheckpointingReport,
)
from lightning_lora.gradient_checkpointing.selection import select_blocks
from lightning_lora.patches import is_patched, patch, unpatch


@overload
def enable_gradient_checkpointing(
    module: nn.Module, config: GradientCheckpointingConfig | None = None, *, strict: Literal[True] = True
) -> GradientCheckpointingReport: ...


@overload
def enable_gradient_checkpointing(
    module: nn.Module, config: GradientCheckpointingConfig | None = None, *, strict: bool
) -> GradientCheckpointingReport | None: ...


def enable_gradient_checkpointing(
    module: nn.Module, config: GradientCheckpointingConfig | None = None, *, strict: bool = True
) -> GradientCheckpointingReport | None:
    """Let blocks of ``module`` keep only their inputs for the backward pass, which computes the rest again.

    It acts exactly when gradients are recorded, whatever mode the module is in, and changes no gradient of a block that
    computes from its arguments, parameters and torch's random numbers. Each block's
    ``forward`` gets a function in front that calls torch's non-reentrant checkpoint (Chen et al., arXiv:1604.06174):
    no key, name, class or hook changes, and inputs need not require gradients. transformers' models are treated alike:
    their own switch does nothing in eval mode, which ``from_pretrained`` returns. A switch of the model's own that is
    on is turned off meanwhile.

    Calling it again replaces what is there. After an error nothing has changed.

    Args:
        module: Any module, adapted or not.
        config: Which blocks; default: all repeated blocks.
        strict: False accepts a module that is not complete yet: patterns that match nothing, and None as the result
            where there is no block at all.

    Returns:
        What happens to which block.

    Raises:
        TargetNotFoundError: If there is no repeated block, or a pattern matches none.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> enable_gradient_checkpointing(net).recomputed
        ('layers.0', 'layers.1', 'layers.2')
        >>> disable_gradient_checkpointing(net)
    """
    config = config or GradientCheckpointingConfig()
    blocks = select_blocks(module, config, strict=strict)
    if not blocks:
        return None
    disable_gradient_checkpointing(module)
    rows = tuple(
        BlockRow(name=name, type=original_class(block).__name__, how=_how(block, index, config))
        for index, (name, block) in enumerate(blocks)
    )
    chosen = [block for row, (_, block) in zip(rows, blocks, strict=True) if row.how in (RECOMPUTED, OFFLOADED)]
    for block in chosen:
        patch(block, "forward", recomputed_forward, config.offload, Called())
    notes = []
    switched = turn_off_own(module)
    if switched:
        notes.append(f"the gradient checkpointing of the model's own is off meanwhile, in {switched} modules")
    cached = skip_caches(module, chosen)
    if cached:
        names = ", ".join(name or "the model" for name in cached)
        notes.append(f"no key-value cache in training steps that do not ask for one (use_cache): {names}")
    return GradientCheckpointingReport(rows, tuple(notes))


def disable_gradient_checkpointing(module: nn.Module) -> None:
    """Undo :func:`enable_gradient_checkpointing`, exactly; does nothing where it is off.

    Args:
        module: The module that it was turned on for.
    """
    for child in module.modules():
        unpatch(child, "forward", recomputed_forward)
    unskip_caches(module)
    give_back_own(module)


def recomputed_blocks(module: nn.Module) -> list[str]:
    """Dotted names of the blocks inside ``module`` that are recomputed now."""
    return [name for name, child in module.named_modules() if is_patched(child, "forward", recomputed_forward)]


def never_called(module: nn.Module) -> list[str]:
    """Dotted names of the recomputed blocks whose ``forward`` was not called with gradients since this is on.

    Such a block keeps its activations: what calls it uses another of its methods, or its layers one by one.
    """
    return [name for name in recomputed_blocks(module) if not vars(module.get_submodule(name))["forward"].args[-1].yet]


def _how(block: nn.Module, index: int, config: GradientCheckpointingConfig) -> str:
    if index % config.every_n:
        return KEPT
    if any(map(is_checkpoint_wrapper, block.modules())):
        return LEFT
    return OFFLOADED if config.offload else RECOMPUTED
