"""LoRA fine-tuning for people who already train with Lightning: one callback, any LightningModule."""

from lightning_lora.callback import LoRACallback
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    CheckpointError,
    LightningLoRAError,
    MergeError,
    MissingDependencyError,
    QuantizationError,
    TargetNotFoundError,
    UnsupportedSetupError,
)
from lightning_lora.flat import FlatOptimizer
from lightning_lora.gradient_checkpointing import (
    GradientCheckpointingConfig,
    GradientCheckpointingReport,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
)
from lightning_lora.injection import disable_adapters, inject_adapters, remove_adapters
from lightning_lora.liger import LigerKernels
from lightning_lora.load import load_from_checkpoint
from lightning_lora.lora import LoRAConfig
from lightning_lora.merging import (
    MergeConfig,
    MergedLayer,
    MergeReport,
    OutputDifference,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.optimizer_swap import OptimizerConfig
from lightning_lora.planning import MemoryPlan, TokenBatch, plan_memory
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.report import InjectionReport, LayerRow
from lightning_lora.streaming import empty_weights
from lightning_lora.version import __version__ as __version__

__all__ = [
    "AdapterConfig",
    "AdapterMismatchError",
    "BaseMismatchError",
    "CheckpointError",
    "FlatOptimizer",
    "GradientCheckpointingConfig",
    "GradientCheckpointingReport",
    "InjectionReport",
    "LayerRow",
    "LigerKernels",
    "LightningLoRAError",
    "LoRACallback",
    "LoRAConfig",
    "MemoryPlan",
    "MergeConfig",
    "MergeError",
    "MergeReport",
    "MergedLayer",
    "MissingDependencyError",
    "OptimizerConfig",
    "OutputDifference",
    "QuantizationConfig",
    "QuantizationError",
    "TargetNotFoundError",
    "TokenBatch",
    "UnsupportedSetupError",
    "disable_adapters",
    "disable_gradient_checkpointing",
    "empty_weights",
    "enable_gradient_checkpointing",
    "inject_adapters",
    "load_from_checkpoint",
    "merge_adapters",
    "plan_memory",
    "remove_adapters",
    "unmerge_adapters",
]
