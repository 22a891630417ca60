"""Make the hyper-parameters in a checkpoint plain, so that ``torch.load(weights_only=True)`` opens it.

Lightning saves what ``save_hyperparameters`` collected as it is: an OmegaConf node or a path makes the file unreadable
for a resume, and an ``nn.Module`` argument puts the whole base into it.
"""

from __future__ import annotations

import io
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

# Lightning's keys: CHECKPOINT_HYPER_PARAMS_KEY, ..._NAME and ..._TYPE of LightningModule and of LightningDataModule.
_ENTRIES = {
    "hyper_parameters": ("hparams_name", "hparams_type"),
    "datamodule_hyper_parameters": ("datamodule_hparams_name", "datamodule_hparams_type"),
}
# What Lightning makes of the values where the type is text: what a class that takes them as one argument can use both
# as cfg["width"] and as cfg.width.
_TYPE = "AttributeDict"


def make_hyperparameters_plain(
    checkpoint: MutableMapping[str, Any], *, keep_objects: bool = False
) -> dict[str, list[str]]:
    """Convert or leave out what is not plain in the hyper-parameters of ``checkpoint``, in place.

    OmegaConf containers become dicts and lists, paths become strings; values that ``weights_only=True`` refuses are
    left out: they have to be passed to ``load_from_checkpoint`` again.

    Args:
        checkpoint: What is about to be saved.
        keep_objects: For a file that the original class loads without this package. Leave out only modules, which hold
            weights: the file may then need ``weights_only=False``. What was OmegaConf can be read by attribute.

    Returns:
        ``left_out`` and ``omegaconf``: the names of the values concerned, for the manifest; ``"*"`` stands for all of
        them as one container.
    """
    changes: dict[str, list[str]] = {"left_out": [], "omegaconf": []}
    for entry, (name_entry, type_entry) in _ENTRIES.items():
        found = checkpoint.get(entry)
        checkpoint.pop(type_entry, None)
        if checkpoint.get(name_entry) not in (None, "kwargs"):  # "kwargs": each value is an argument
            checkpoint[type_entry] = _TYPE
        if found is None:
            continue
        whole = _is_omegaconf(found)
        if whole:
            changes["omegaconf"].append("*")
        plain = {}
        for name, value in _plain(found).items():
            # Values of an OmegaConf container are not looked at: one that can't be resolved would raise.
            of_omegaconf = isinstance(value, (dict, list)) if whole else _contains(found[name], _is_omegaconf)
            if of_omegaconf:
                changes["omegaconf"].append(str(name))
            has_weights = _contains(value, lambda item: isinstance(item, nn.Module))
            if has_weights or not (keep_objects or opens_safely(value)):
                changes["left_out"].append(str(name))
            else:
                plain[name] = _readable_by_attribute(value) if keep_objects and of_omegaconf else value
        checkpoint[entry] = plain
    return changes


def _plain(value: Any) -> Any:
    if _is_omegaconf(value):
        return _plain_omegaconf(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _plain_omegaconf(node: Any) -> Any:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(node, resolve=False)
    if not isinstance(plain, (dict, list)):  # a container that is missing, None or one interpolation
        return plain
    for key in plain if isinstance(plain, dict) else range(len(plain)):
        try:
            plain[key] = _plain(node[key])
        except Exception:  # a missing value, or an interpolation that means something in another process: as written
            log.debug("hyper-parameter %r can't be resolved and is saved as written", key)
    return plain


def _readable_by_attribute(value: Any) -> Any:
    """Dicts, however deep, as the one plain type that keeps attributes in a file that opens with ``weights_only``."""
    if isinstance(value, dict):
        readable = OrderedDict({key: _readable_by_attribute(item) for key, item in value.items()})
        vars(readable).update(
            {key: item for key, item in readable.items() if isinstance(key, str) and not hasattr(OrderedDict, key)}
        )
        return readable
    return [_readable_by_attribute(item) for item in value] if isinstance(value, list) else value


def _contains(value: Any, test: Any) -> bool:
    if test(value):
        return True
    if isinstance(value, Mapping):
        return any(_contains(item, test) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_contains(item, test) for item in value)


def _is_omegaconf(value: Any) -> bool:
    return type(value).__module__.startswith("omegaconf.")


def opens_safely(value: Any) -> bool:
    """Whether a file with this value opens without unpickling anything but plain types: tried, not guessed."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever keeps it from being written or read
        return False
    return True
