"""Recompute activations in the backward pass instead of keeping them (Chen et al., arXiv:1604.06174)."""

from lightning_lora.gradient_checkpointing.config import GradientCheckpointingConfig, as_gradient_checkpointing_config
from lightning_lora.gradient_checkpointing.report import BlockRow, GradientCheckpointingReport
from lightning_lora.gradient_checkpointing.switch import (
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    never_called,
    recomputed_blocks,
)

__all__ = [
    "BlockRow",
    "GradientCheckpointingConfig",
    "GradientCheckpointingReport",
    "as_gradient_checkpointing_config",
    "disable_gradient_checkpointing",
    "enable_gradient_checkpointing",
    "never_called",
    "recomputed_blocks",
]
