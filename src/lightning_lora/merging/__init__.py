"""Fold adapters into their base, with proof, and take them out again exactly."""

from lightning_lora.merging.bases import BASES, original_weights
from lightning_lora.merging.changes import changed_since_merge
from lightning_lora.merging.config import MergeConfig
from lightning_lora.merging.merge import is_merged, merge_adapters, unmerge_adapters, unmerge_for_now
from lightning_lora.merging.proof import measure_merge, merged_weights, plain_weights
from lightning_lora.merging.report import MergedLayer, MergeReport, Norms, OutputDifference

__all__ = [
    "BASES",
    "MergeConfig",
    "MergeReport",
    "MergedLayer",
    "Norms",
    "OutputDifference",
    "changed_since_merge",
    "is_merged",
    "measure_merge",
    "merge_adapters",
    "merged_weights",
    "original_weights",
    "plain_weights",
    "unmerge_adapters",
    "unmerge_for_now",
]
