"""A LoRA linear layer as one autograd node: less time and memory than the base and its update one after the other."""

from lightning_lora.fused.cast_copy import CastCopy
from lightning_lora.fused.conditions import may_fuse, product_dtype
from lightning_lora.fused.linear import Frozen, lora_linear, lora_linear_and_input

__all__ = ["CastCopy", "Frozen", "lora_linear", "lora_linear_and_input", "may_fuse", "product_dtype"]
