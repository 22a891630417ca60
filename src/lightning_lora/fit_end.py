"""The merge at fit end: artifact first, then the live module, then the proof."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lora.checkpoint import complete_base
from lightning_lora.checkpoint_file import read_checkpoint
from lightning_lora.errors import MergeError, UnsupportedSetupError
from lightning_lora.export import write_merged, write_report
from lightning_lora.hooks import save_as_the_module_would
from lightning_lora.hyperparameters import make_hyperparameters_plain
from lightning_lora.injection import disable_adapters
from lightning_lora.lightning_names import is_a
from lightning_lora.merge import (
    MergeConfig,
    MergeReport,
    OutputDifference,
    measure_merge,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.sample import SampleCall, difference


def check_merge(trainer: pl.Trainer, config: MergeConfig) -> None:
    """Refuse, before the training, a merge that could not be done after it.

    Raises:
        UnsupportedSetupError: If the best checkpoint is asked for and none will be kept, or the folder can't be made.
    """
    if config.source == "best" and not _is_dry_run(trainer) and _best_callback(trainer) is None:
        raise UnsupportedSetupError(
            'MergeConfig(source="best") needs a ModelCheckpoint(monitor=...) in the Trainer to say which is best.'
        )
    parent = artifact_path(trainer, config).parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir():
        raise UnsupportedSetupError(f"MergeConfig.output_dir: {existing} is a file, so {parent} can't be made.")


def merge_at_fit_end(
    trainer: pl.Trainer, module: pl.LightningModule, config: MergeConfig, sample: SampleCall
) -> MergeReport:
    """Write the merged artifact of a run, make the live module plain, and report on both.

    Raises:
        MergeError: If the merge would not be right; adapters and checkpoints are untouched then.
    """
    config = _load_best(trainer, module, config) if config.source == "best" else config
    report = measure_merge(module, config)
    adapted = sample.outputs(module)
    with disable_adapters(module):
        base = sample.outputs(module) if adapted else None
    folder = _write(trainer, module, config)
    report = dataclasses.replace(report, folder=str(folder))
    merged = _merge_in_place(module, config)
    if merged and adapted and base:
        report = dataclasses.replace(report, output_difference=_output_difference(module, sample, adapted, base))
    if merged and not config.in_place:
        unmerge_adapters(module)
    if trainer.is_global_zero:
        write_report(report, folder)
    return report


def _write(trainer: pl.Trainer, module: pl.LightningModule, config: MergeConfig) -> Path:
    """Write the artifact on rank zero; the others wait, and learn where it is or why it is not."""
    path = artifact_path(trainer, config)  # asks all ranks for the log folder
    folder: Path | None = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            folder = write_merged(module, path, config, make_checkpoint=functools.partial(_vanilla_checkpoint, module))
        except Exception as error:  # whatever it is, the other ranks must not wait for ever
            failure = error
    folder, message = trainer.strategy.broadcast((folder, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if folder is None:
        raise MergeError(f"Rank zero could not write the merged weights: {message}")
    return folder


def artifact_path(trainer: pl.Trainer, config: MergeConfig) -> Path:
    """Where the merged artifact of a run goes, unless something is there already."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    return Path(trainer.log_dir or trainer.default_root_dir) / "merged"


def _merge_in_place(module: pl.LightningModule, config: MergeConfig) -> bool:
    try:
        merge_adapters(module, config)
    except MergeError as error:
        # The artifact may be in a wider dtype than the live module can hold.
        rank_zero_warn(f"The live module keeps its adapters, only the artifact is merged: {error}")
        return False
    return True


def _output_difference(
    module: pl.LightningModule, sample: SampleCall, adapted: list[Any], base: list[Any]
) -> OutputDifference | None:
    merged = sample.outputs(module)
    if merged is None:
        return None
    largest, norm = difference(merged, adapted)
    _, effect = difference(adapted, base)
    return OutputDifference(max_abs=largest, relative=norm / effect if effect else 0.0)


def _load_best(trainer: pl.Trainer, module: pl.LightningModule, config: MergeConfig) -> MergeConfig:
    callback = _best_callback(trainer)
    path = callback.best_model_path if callback is not None else ""
    if not path:
        rank_zero_warn("No checkpoint was saved in this run: the last adapters are merged, not the best.")
        return dataclasses.replace(config, source="last")
    checkpoint = read_checkpoint(path)
    complete_base(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    return config


def _is_dry_run(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set from outside the class


def _best_callback(trainer: pl.Trainer) -> Any | None:
    callbacks: list[Any] = [c for c in trainer.checkpoint_callbacks if is_a(c, "ModelCheckpoint")]
    return next((c for c in callbacks if c.monitor is not None), None)


def _vanilla_checkpoint(module: pl.LightningModule, state: dict[str, Tensor]) -> dict[str, Any]:
    """The merged weights as a checkpoint that ``load_from_checkpoint`` of the original class opens."""
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        "state_dict": state,
    }
    if module.hparams:
        checkpoint["hyper_parameters"] = dict(module.hparams)
        if hasattr(module, "_hparams_name"):
            checkpoint["hparams_name"] = module._hparams_name
        # A class that saves objects of its own gets them back, as from its own checkpoints.
        make_hyperparameters_plain(checkpoint, keep_objects=True)
    save_as_the_module_would(module, checkpoint)
    return checkpoint
