"""The one note that an injection leaves on a module: what is needed to undo, save, merge and continue it.

It is a plain object in the module's ``__dict__``, copied and pickled with it; the layers say what is adapted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterConfig
from lightning_lora.kept_weights import KeptWeight
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.report import InjectionReport

_ATTRIBUTE = "_lightning_lora"


@dataclass
class MergedState:
    """What an exact unmerge needs: the base weights that the merge replaced, and the adapters it folded in.

    Attributes:
        adapters: Layer name -> its adapters.
        active: Layer name -> the names of the adapters that acted.
        weights: Layer name -> what was the base weight. Left behind when a merged module is pickled or
            copied: the copy is a plain module that can't be unmerged.
        redeclare: Undoes that transformers models were declared dense, where quantized layers became dense.
        sums: Name -> dtype and checksum of each parameter of the base as the merge left it, merged or not: what is
            trained after the merge is in no adapter-only file, and unmerging would throw it away.
    """

    adapters: dict[str, nn.ModuleDict] = field(default_factory=dict)
    active: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, KeptWeight] | None = field(default_factory=dict)
    sums: dict[str, tuple[torch.dtype, int]] = field(default_factory=dict)
    redeclare: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None, "redeclare": None}


@dataclass
class Record:
    """State of the injection on a root module.

    Names are canonical: without what torch.compile inserts, as the user may compile a part before or after.

    Attributes:
        configs: Adapter name -> its config.
        was_trainable: Names of the parameters that the injection froze.
        was_frozen: Names of the parameters that the injection made trainable (modules to save).
        saved: Names of parameters and buffers that are trained on purpose and saved beside the adapters.
        originals: Their values before training, for an exact removal.
        buffers: Values of the persistent buffers of the base at the injection: one that changed is saved, and comes
            back where a file does not hold it and at a removal.
        base: Fingerprint of the base's parameters then: where another base was loaded since, its buffers were, too.
        complete: Whether the whole module has been there for an injection, and everything in its config was found.
        quantization: How the linear layers of the base were quantized, if they were.
        report: What the last injection reported.
        patched: Names of instance attributes put over methods of the module, taken away at removal.
        merged: Set while the adapters are merged into the base.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    was_trainable: set[str] = field(default_factory=set)
    was_frozen: set[str] = field(default_factory=set)
    saved: list[str] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    complete: bool = False
    quantization: QuantizationConfig | None = None
    report: InjectionReport | None = None
    patched: list[str] = field(default_factory=list)
    merged: MergedState | None = None

    def copy(self) -> Record:
        """The same in containers of its own, around the same tensors."""
        twin = copy.copy(self)
        vars(twin).update(
            {key: copy.copy(value) for key, value in vars(self).items() if isinstance(value, (dict, set, list))}
        )
        return twin


def find_record(module: nn.Module) -> Record | None:
    """The record on ``module`` itself, or None."""
    record = module.__dict__.get(_ATTRIBUTE)
    return record if isinstance(record, Record) else None


def find_nested_record(module: nn.Module) -> str | None:
    """Dotted name of a submodule, not ``module`` itself, that has a record of its own."""
    return next((name for name, child in module.named_modules() if name and find_record(child) is not None), None)


def store_record(module: nn.Module, record: Record) -> None:
    """Put the record on ``module``."""
    module.__dict__[_ATTRIBUTE] = record


def drop_record(module: nn.Module) -> None:
    """Take the record off ``module``."""
    module.__dict__.pop(_ATTRIBUTE, None)
