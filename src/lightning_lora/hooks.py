"""What is put in front of methods of the LightningModule and the strategy: injection, saving and loading.

Lightning calls no callback hook between ``configure_model`` and the restoring of a checkpoint, and none at all when
``ModelCheckpoint(save_weights_only=True)`` saves, so a callback alone can do none of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.checkpoint import complete_base, strip_base
from lightning_lora.checkpoint_file import MANIFEST, check_checkpoint, read_checkpoint
from lightning_lora.errors import CheckpointError, MergeError
from lightning_lora.guards import require_equal_bases
from lightning_lora.hyperparameters import make_hyperparameters_plain
from lightning_lora.injection import withdraw_incomplete
from lightning_lora.merging import changed_since_merge, is_merged, unmerge_for_now
from lightning_lora.patches import is_patched, original, patch, unpatch
from lightning_lora.random_state import random_state
from lightning_lora.record import Record, find_record

Method = Callable[..., Any] | None


def patch_run(trainer: pl.Trainer, module: pl.LightningModule, prepare: Callable[..., Any]) -> None:
    """For the time of one run: inject after ``configure_model``, and read checkpoints with errors of our own."""
    patch(module, "configure_model", _configure_model, prepare)
    patch(trainer.strategy, "load_checkpoint", _load_checkpoint)


def unpatch_run(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Undo :func:`patch_run`; safe to call twice."""
    unpatch(module, "configure_model", _configure_model)
    unpatch(trainer.strategy, "load_checkpoint", _load_checkpoint)


def patch_checkpoints(module: pl.LightningModule) -> None:
    """As long as the module has adapters, also after the run: adapter-only files on every save path."""
    for name, function in (("on_save_checkpoint", _on_save), ("on_load_checkpoint", _on_load)):
        patch(module, name, function)
        record = find_record(module)
        if record is not None and name not in record.patched:
            record.patched.append(name)


def save_as_the_module_would(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Let the module's own ``on_save_checkpoint`` add to ``checkpoint`` what its own class needs to load it."""
    patched = module.__dict__.get("on_save_checkpoint")
    previous = (
        patched.args[1] if patched is not None and is_patched(module, "on_save_checkpoint", _on_save) else patched
    )
    original(module, "on_save_checkpoint", previous)(checkpoint)


def _configure_model(module: pl.LightningModule, previous: Method, prepare: Callable[..., Any]) -> None:
    original(module, "configure_model", previous)()
    if not is_merged(module):
        try:
            prepare(module, strict=True)
        except Exception:
            withdraw_incomplete(module)
            raise
        patch_checkpoints(module)
        require_equal_bases(module.trainer, module)


def _on_save(module: pl.LightningModule, previous: Method, checkpoint: dict[str, Any]) -> None:
    original(module, "on_save_checkpoint", previous)(checkpoint)
    record = find_record(module)
    if record is None or _is_plain(module, record):
        return
    changes = make_hyperparameters_plain(checkpoint)
    if changes["left_out"]:
        rank_zero_warn(
            f"The hyper-parameters {', '.join(changes['left_out'])} are no plain values and are left out of the "
            "checkpoint; pass them to load_from_checkpoint. save_hyperparameters(ignore=[...]) silences this."
        )
    with _unmerged(module) as was_merged:
        if was_merged:
            checkpoint["state_dict"] = module.state_dict()
        strip_base(module, checkpoint)
    checkpoint[MANIFEST]["hyper_parameters"] = changes
    if "optimizer_states" in checkpoint:  # else the file is weights-only, and no fit can go on from it
        checkpoint[MANIFEST]["random_state"] = random_state(module.trainer)
        checkpoint[MANIFEST]["optimizers"] = [type(optimizer).__name__ for optimizer in module.trainer.optimizers]


def _on_load(module: pl.LightningModule, previous: Method, checkpoint: dict[str, Any]) -> None:
    load = original(module, "on_load_checkpoint", previous)
    record = find_record(module)
    if record is None or (record.merged is not None and MANIFEST not in checkpoint):
        load(checkpoint)
        return
    merge_again = _unmerge_for_loading(module, record)
    try:
        complete_base(module, checkpoint)
        load(checkpoint)
    except Exception:
        merge_again()
        raise


def _unmerge_for_loading(module: pl.LightningModule, record: Record) -> Callable[[], None]:
    if record.merged is None:
        return lambda: None
    if record.merged.weights is None:
        raise MergeError(
            "This checkpoint holds adapters, and the module is a copy of a merged one, or was merged with "
            "keep_base=False: they would be added twice. Build the module anew."
        )
    return unmerge_for_now(module)


def _load_checkpoint(strategy: Strategy, previous: Method, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
    load = original(strategy, "load_checkpoint", previous)
    local = "://" not in str(checkpoint_path)
    if local and not Path(checkpoint_path).exists():
        raise CheckpointError(f"There is no checkpoint at {checkpoint_path}.")
    accepts = "weights_only" in inspect.signature(type(strategy).load_checkpoint).parameters
    if local and not accepts:
        read_checkpoint(checkpoint_path)  # lightning 2.5 would unpickle anything
    if accepts and kwargs.get("weights_only") is None and not args:
        kwargs["weights_only"] = True
    failure = None
    try:
        checkpoint = load(checkpoint_path, *args, **kwargs)
    except Exception as error:  # what torch raises for damaged and hostile files has many types
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if failure is not None:
        if local:
            read_checkpoint(checkpoint_path)  # says more of what is wrong
        raise CheckpointError(f"{checkpoint_path} can't be loaded: {failure}")
    check_checkpoint(checkpoint, checkpoint_path, local=local)
    return checkpoint


@contextmanager
def _unmerged(module: pl.LightningModule) -> Iterator[bool]:
    """Within this context the adapters are live; yields whether they had been merged."""
    if not is_merged(module):
        yield False
        return
    merge_again = unmerge_for_now(module)
    try:
        yield True
    finally:
        merge_again()


def _is_plain(module: pl.LightningModule, record: Record) -> bool:
    """Whether a merged module is no more than its weights: a copy, or trained or loaded since the merge."""
    merged = record.merged
    return merged is not None and (merged.weights is None or bool(changed_since_merge(module)))
