"""The merge at fit end: the proof first, then the artifact, then the live module."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lora.checkpoint import complete_base
from lightning_lora.checkpoint_file import read_checkpoint
from lightning_lora.errors import MergeError, UnsupportedSetupError
from lightning_lora.export import write_merged, write_report
from lightning_lora.hooks import save_as_the_module_would
from lightning_lora.hyperparameters import make_hyperparameters_plain
from lightning_lora.injection import disable_adapters
from lightning_lora.layers import adapted_layers
from lightning_lora.lightning_names import is_a
from lightning_lora.merging import (
    MergeConfig,
    MergeReport,
    OutputDifference,
    is_merged,
    measure_merge,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.sample import SampleCall, agree, comparable, difference, rounding
from lightning_lora.targets.patterns import canonical


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
        MergeError: If the merge would not be right, or can't be written; adapters and checkpoints are untouched then.
    """
    with _adapters_to_merge(trainer, module, config) as config:
        report = measure_merge(module, config)
        proof = _prove_by_outputs(trainer, module, config, sample)
        folder = _write(trainer, module, config)
        report = dataclasses.replace(report, folder=str(folder), output_difference=proof)
        if config.in_place:
            _merge_in_place(module, config)
    if trainer.is_global_zero:
        write_report(report, folder)
    return report


def _prove_by_outputs(
    trainer: pl.Trainer, module: pl.LightningModule, config: MergeConfig, sample: SampleCall
) -> OutputDifference | None:
    """Merge for a moment and compare the outputs, before anything is written; every rank on its own batch."""
    proof, right = None, True
    adapted, again = sample.outputs(module), sample.outputs(module)
    with disable_adapters(module):
        base = sample.outputs(module)
    # A module that gives other outputs at every call can't be compared with itself.
    if adapted and again and base and _equal(adapted, again) and comparable(adapted, base):
        merged = _merged_outputs(module, config, sample)
        if merged and comparable(merged, adapted):
            largest, error = difference(merged, adapted)
            _, effect = difference(adapted, base)
            proof = OutputDifference(max_abs=largest, relative=error / effect if effect else 0.0)
            eps = rounding(layer.computed_in for _, layer in adapted_layers(module))
            right = agree(merged, adapted, base, tolerance=config.tolerance, eps=eps)
    if config.base == "original":
        return proof  # how far other weights are from those of the run is what the report says
    if not trainer.strategy.reduce_boolean_decision(right):
        share = "too much" if right or proof is None else f"by {proof.relative:.0%} of what the adapters change"
        raise MergeError(
            "The merged module does not compute what the adapted one does: its outputs differ "
            f"{share}, on a batch of the run{' on another rank' if right else ''} (tolerance {config.tolerance:.0%}). "
            "Something reads the weight of an adapted layer without calling the layer, as F.linear(x, layer.weight) "
            "does, and saw the base's weight in the run. Leave that layer out (exclude_modules), or use the adapters "
            "live. Nothing was written; the adapters and their checkpoints are untouched."
        )
    return proof


def _merged_outputs(module: pl.LightningModule, config: MergeConfig, sample: SampleCall) -> list[Tensor] | None:
    try:
        merge_adapters(module, dataclasses.replace(config, keep_base=True))
    except MergeError:  # the live dtype can't hold it; merging in place says so
        return None
    try:
        return sample.outputs(module)
    finally:
        unmerge_adapters(module)


def _equal(outputs: list[Tensor], others: list[Tensor]) -> bool:
    return comparable(outputs, others) and all(map(torch.equal, outputs, others))


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


def _merge_in_place(module: pl.LightningModule, config: MergeConfig) -> None:
    try:
        merge_adapters(module, config)
    except MergeError as error:
        # The artifact may be in a wider dtype than the live module can hold.
        rank_zero_warn(f"The live module keeps its adapters, only the artifact is merged: {error}")


@contextmanager
def _adapters_to_merge(trainer: pl.Trainer, module: pl.LightningModule, config: MergeConfig) -> Iterator[MergeConfig]:
    """Within this context the adapters that the config means are live; after it the last ones, unless merged."""
    if config.source == "last":
        yield config
        return
    callback = _best_callback(trainer)
    path = callback.best_model_path if callback is not None else ""
    if not path:
        rank_zero_warn("No checkpoint was saved in this run: the last adapters are merged, not the best.")
        yield dataclasses.replace(config, source="last")
        return
    checkpoint = read_checkpoint(path)
    trained = set(map(canonical, checkpoint["state_dict"]))
    frozen = {key for key, _ in module.named_parameters(remove_duplicate=False) if canonical(key) not in trained}
    last = {key: copy.deepcopy(value) for key, value in module.state_dict().items() if key not in frozen}
    try:
        complete_base(module, checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=True)
        yield config
    finally:
        if not is_merged(module):
            module.load_state_dict({**module.state_dict(), **last}, strict=True)


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
        checkpoint["hyper_parameters"] = module.hparams
        if hasattr(module, "_hparams_name"):
            checkpoint["hparams_name"] = module._hparams_name
        # A class that saves objects of its own gets them back, as from its own checkpoints.
        make_hyperparameters_plain(checkpoint, keep_objects=True)
    save_as_the_module_would(module, checkpoint)
    return checkpoint
