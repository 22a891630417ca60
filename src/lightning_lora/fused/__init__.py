"""A LoRA linear layer as one autograd node: less time and memory than the base and its update one after the other."""

from lightning_lora.fused.cast_copy import CastCopy
from lightning_lora.fused.conditions import is_eager, may_fuse, product_dtype
from lightning_lora.fused.draw import KERNELS, is_dry_run, prepare_kernels
from lightning_lora.fused.frozen import frozen_linear
from lightning_lora.fused.joint import Joint, follow, lead
from lightning_lora.fused.linear import Frozen, lora_linear
from lightning_lora.fused.widened import is_emulated

__all__ = [
    "KERNELS",
    "CastCopy",
    "Frozen",
    "Joint",
    "follow",
    "frozen_linear",
    "is_dry_run",
    "is_eager",
    "is_emulated",
    "lead",
    "lora_linear",
    "may_fuse",
    "prepare_kernels",
    "product_dtype",
]
