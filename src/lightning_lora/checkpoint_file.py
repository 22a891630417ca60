"""Open checkpoint files without running code from them, and say in our own words what is wrong with a damaged one.

Errors are raised without a cause: what torch, zipfile or Lightning trip over in a damaged file helps nobody.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from lightning_lora.errors import CheckpointError

MANIFEST = "lightning_lora"
_NOTHING_CHANGED = "Use another checkpoint; nothing was changed."


def read_checkpoint(path: Any, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Open a checkpoint file without running code from it.

    Raises:
        CheckpointError: If the file is absent, damaged, no checkpoint, or holds anything but plain types and tensors.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # truncated zip, not a zip, hostile pickle: torch raises many types
        raise CheckpointError(_why_unreadable(path, error)) from None
    check_checkpoint(checkpoint, path)
    return dict(checkpoint)


def check_checkpoint(checkpoint: Any, path: Any, *, local: bool = True) -> None:
    """Refuse what is no Lightning checkpoint, or a damaged one of ours.

    Args:
        checkpoint: What was read from the file.
        path: The file.
        local: Whether ``path`` is on a local file system, so that its bytes can be checked.

    Raises:
        CheckpointError: With the part that is wrong.
    """
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path} is no Lightning checkpoint: it has no 'state_dict'. {_NOTHING_CHANGED}")
    broken = _broken_entries(checkpoint)
    if broken:
        raise CheckpointError(
            f"{path} is damaged: its {', '.join(map(repr, broken))} is not usable. {_NOTHING_CHANGED}"
        )
    if local and MANIFEST in checkpoint:
        _check_bytes(path)


def _broken_entries(checkpoint: Mapping[str, Any]) -> list[str]:
    """Entries that Lightning would stumble over somewhere later, or worse, not stumble over."""
    version, loops = checkpoint.get("pytorch-lightning_version"), checkpoint.get("loops") or {}
    right = {
        "state_dict": _has_names(checkpoint["state_dict"]),
        "pytorch-lightning_version": isinstance(version, str) and re.match(r"\d+\.\d+", version) is not None,
        # Without it Lightning would begin at the first epoch, with the optimizers of a later one.
        "loops": _has_names(loops) and (bool(loops) or MANIFEST not in checkpoint),
        "callbacks": isinstance(checkpoint.get("callbacks") or {}, dict),
        "hyper_parameters": isinstance(checkpoint.get("hyper_parameters", {}), Mapping),
        "optimizer_states": _is_list_of(checkpoint.get("optimizer_states", []), _is_optimizer_state),
        "lr_schedulers": _is_list_of(checkpoint.get("lr_schedulers", []), lambda item: isinstance(item, Mapping)),
    }
    return [entry for entry, usable in right.items() if not usable]


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_list_of(value: Any, test: Any) -> bool:
    return isinstance(value, list) and all(map(test, value))


def _is_optimizer_state(state: Any) -> bool:
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return False
    groups = state.get("param_groups")
    return _is_list_of(groups, lambda group: isinstance(group, Mapping) and isinstance(group.get("params"), list))


def _check_bytes(path: Any) -> None:
    """Compare a checkpoint file with the checksums in it, which torch writes and never looks at."""
    if not zipfile.is_zipfile(path):
        return  # torch's format before 1.6 has none
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
        damaged = "its table of contents"
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong. {_NOTHING_CHANGED}")


def _why_unreadable(path: Any, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"There is no checkpoint at {path}."
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, not a checkpoint file."
    if isinstance(error, PermissionError):
        return f"{path} can't be opened: permission denied."
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{path} can't be opened: it holds Python objects, which are never unpickled because that can run any "
            f"code, or it is no checkpoint. {_NOTHING_CHANGED}"
        )
    reason = (str(error).splitlines() or ["no message"])[0]
    return (
        f"{path} can't be opened: it is cut off or damaged, or no checkpoint "
        f"({type(error).__name__}: {reason}). {_NOTHING_CHANGED}"
    )
