"""Hundreds of small tensors as one for the optimizer: one norm, one clipping, one step, one zeroing."""

from lightning_lora.flat.callback import FlatOptimizer

__all__ = ["FlatOptimizer"]
