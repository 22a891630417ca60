"""Another class for the optimizers that the user's code made: 8-bit and paged AdamW, imported only when asked for."""

from lightning_lora.optimizer_swap.config import OptimizerConfig, as_optimizer_config
from lightning_lora.optimizer_swap.swap import swap_optimizers

__all__ = ["OptimizerConfig", "as_optimizer_config", "swap_optimizers"]
