"""What a merge makes of the adapters, and where it writes it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lightning_lora.merging.bases import BASES

SOURCES = ("last", "best")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How the callback merges at fit end.

    Attributes:
        source: ``"last"`` merges the adapters as they are at fit end, ``"best"`` those of the checkpoint that
            ``ModelCheckpoint`` found best.
        output_dir: Folder of the merged artifact; None: ``merged`` in the run's folder. An existing folder is never
            written into: ``merged-v1``, ``merged-v2``, ... is used instead.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` of the written weights; None: the base's own.
        base: Of a base in 4, 8 or 16 bits. ``"dequantized"``: the weights that the adapters were trained on.
            ``"original"``: those from before the quantization, whose errors the adapters may have learned to correct.
            ``"requantized"``: the merged weights go through those bits again, where most of a small update gets
            lost; the live module stays quantized.
        original: Where the weights from before the quantization are: a safetensors file, an index of sharded ones, a
            folder, or a name on the Hugging Face hub; None: where transformers loaded the model from.
        in_place: Whether the live module becomes plain, with merged weights, after the artifact is written.
        keep_base: Whether the module keeps the weights that a merge in place replaces, for an exact unmerge and for
            tests and fits after it that load adapters. Without them a merge of a dense base takes the memory of one
            layer, not that of all, and the module is plain for good: it is saved whole, and loads no adapters. (At fit
            end the proof by outputs keeps them for a moment.)
        tolerance: Refuse a merge whose rounding error, over all layers, exceeds this share of the update, or that
            changes outputs by more than this share of what the adapters change in them (and by more than rounding
            explains): those of the live module in its own dtype, on a batch of the run, and those of every layer whose
            class has a forward of its own.

    Raises:
        ValueError: For a value that has no meaning.
    """

    source: str = "last"
    output_dir: str | None = None
    dtype: str | None = None
    base: str = "dequantized"
    original: str | None = None
    in_place: bool = True
    keep_base: bool = True
    tolerance: float = 0.3

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {self.source!r}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be None or one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        if self.output_dir is not None and (
            not isinstance(self.output_dir, (str, os.PathLike)) or not str(self.output_dir).strip()
        ):
            raise ValueError(f"output_dir must be None or the path of a folder, got {self.output_dir!r}.")
        if self.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}; got {self.base!r}.")
        if self.original is not None and (self.base != "original" or not str(self.original).strip()):
            raise ValueError(
                f"original is a path that base='original' reads, got {self.original!r} with {self.base!r}."
            )
        for name, choice in (("in_place", self.in_place), ("keep_base", self.keep_base)):
            if not isinstance(choice, bool):
                raise ValueError(f"{name} must be True or False, got {choice!r}.")
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)) or not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance!r}.")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """``dtype`` as torch's."""
        return None if self.dtype is None else DTYPES[self.dtype]
