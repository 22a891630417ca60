"""Make the hyper-parameters in a checkpoint plain, so that ``torch.load(weights_only=True)`` opens it.

Lightning saves what ``save_hyperparameters`` collected as it is: an OmegaConf node or a path makes the file unreadable
for a resume, and an ``nn.Module`` argument puts the whole base into it.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

# Lightning's keys: LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, ..._TYPE, and the same of LightningDataModule.
_ENTRIES = ("hyper_parameters", "datamodule_hyper_parameters")
_TYPES = ("hparams_type", "datamodule_hparams_type")


def make_hyperparameters_plain(
    checkpoint: MutableMapping[str, Any], *, keep_objects: bool = False
) -> dict[str, list[str]]:
    """Convert or leave out what is not plain in the hyper-parameters of ``checkpoint``, in place.

    OmegaConf containers become dicts and lists, paths become strings; values that ``weights_only=True`` refuses are
    left out: they have to be passed to ``load_from_checkpoint`` again.

    Args:
        checkpoint: What is about to be saved.
        keep_objects: Leave out only modules, which hold weights: the file may then need ``weights_only=False``.

    Returns:
        ``left_out`` and ``omegaconf``: the names of the values concerned, for the manifest.
    """
    changes: dict[str, list[str]] = {"left_out": [], "omegaconf": []}
    for entry in _ENTRIES:
        found = checkpoint.get(entry)
        if found is None:
            continue
        if _is_omegaconf(found):
            changes["omegaconf"].append("*")
        values = _plain(found)
        plain = {}
        for name, value in values.items():
            if _contains(found[name], _is_omegaconf):
                changes["omegaconf"].append(str(name))
            has_weights = _contains(value, lambda item: isinstance(item, nn.Module))
            if has_weights or not (keep_objects or _opens_safely(value)):
                changes["left_out"].append(str(name))
            else:
                plain[name] = value
        checkpoint[entry] = plain
    for entry in _TYPES:
        checkpoint.pop(entry, None)
    return changes


def _plain(value: Any) -> Any:
    if _is_omegaconf(value):
        from omegaconf import OmegaConf

        return _plain(OmegaConf.to_container(value, resolve=True))
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _contains(value: Any, test: Any) -> bool:
    if test(value):
        return True
    if isinstance(value, Mapping):
        return any(_contains(item, test) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_contains(item, test) for item in value)


def _is_omegaconf(value: Any) -> bool:
    return type(value).__module__.startswith("omegaconf.")


def _opens_safely(value: Any) -> bool:
    """Whether a file with this value opens without unpickling anything but plain types: tried, not guessed."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever keeps it from being written or read
        return False
    return True
