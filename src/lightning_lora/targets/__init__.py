"""Which layers get adapters: from patterns and presets to an ordered list of layers, with a reason for every other."""

from lightning_lora.targets.patterns import Pattern, matches_any
from lightning_lora.targets.selection import Selection, Target, select_targets

__all__ = ["Pattern", "Selection", "Target", "matches_any", "select_targets"]
