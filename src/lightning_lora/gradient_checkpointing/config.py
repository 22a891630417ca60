"""Which blocks are recomputed in the backward pass, and where their inputs wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.config import as_patterns

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class GradientCheckpointingConfig:
    """Keep only the inputs of blocks in the forward pass, and compute what is inside again in the backward pass.

    Attributes:
        every_n: Recompute every n-th block, counted over the whole module from the first one, as ``every_n_layers`` of
            transformers does: with 2, blocks 0, 2, 4, ... are recomputed and the others keep their activations.
        blocks: ``"auto"``: the repeated blocks of the module, as
            :func:`~lightning_lora.gradient_checkpointing.repeated.repeated_blocks` finds them; or a pattern or a list
            of patterns, as in :class:`~lightning_lora.config.AdapterConfig`. A pattern that matches an
            ``nn.ModuleList`` or ``nn.ModuleDict`` means its entries; of blocks inside each other, the outermost counts.
        offload: Move the inputs that wait for the backward pass from the device to (pinned) CPU memory.

    Raises:
        ValueError: For a value that has no meaning; the message names the field.
    """

    every_n: int = 1
    blocks: str | tuple[str, ...] = AUTO
    offload: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.every_n, bool) or not isinstance(self.every_n, int) or self.every_n < 1:
            raise ValueError(f"every_n must be an integer of at least 1, got {self.every_n!r}.")
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload must be True or False, got {self.offload!r}.")
        patterns = as_patterns("blocks", self.blocks)
        if not patterns or (AUTO in patterns and len(patterns) > 1):
            raise ValueError(f'blocks must be "auto" or name at least one block by a pattern, got {self.blocks!r}.')
        object.__setattr__(self, "blocks", AUTO if AUTO in patterns else patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of ``blocks``; none for ``"auto"``."""
        return () if isinstance(self.blocks, str) else self.blocks

    def to_dict(self) -> dict[str, Any]:
        """The config as plain dicts, lists, strings and numbers."""
        blocks = self.blocks if isinstance(self.blocks, str) else list(self.blocks)
        return {"every_n": self.every_n, "blocks": blocks, "offload": self.offload}


def as_gradient_checkpointing_config(value: Any) -> GradientCheckpointingConfig | None:
    """None and False: None; True: the default; also what Hydra makes of a nested node without ``_target_``."""
    if isinstance(value, bool):
        return GradientCheckpointingConfig() if value else None
    if isinstance(value, Mapping):
        return GradientCheckpointingConfig(**{str(key): item for key, item in value.items() if key != "_target_"})
    if value is not None and not isinstance(value, GradientCheckpointingConfig):
        raise ValueError(f"gradient_checkpointing must be True, False or a GradientCheckpointingConfig, got {value!r}.")
    return value
