"""The pieces that lives of a run are put together from; imported by tests and by the processes that they start."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from lightning_lora import LoRACallback, LoRAConfig

LIGHTNINGS_ADVICE = [
    # A frozen norm layer is in eval mode on purpose, and so is what from_pretrained returns.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    # Tests resume and test with fewer callbacks than they trained with, and save into other folders.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    # Said of any fit with an OnExceptionCheckpoint, which resumes from its file if there is one.
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
]
ADAPTERS = {f"backbone.{index}.adapters.default.lora_{part}" for index in (0, 4) for part in "AB"}


class Recorder(Logger):
    """A logger that keeps every value as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, str, float]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(step or 0, name, value) for name, value in metrics.items() if name != "epoch"]

    def of(self, name: str) -> list[float]:
        return [value for _, key, value in self.rows if key == name]


def quiet_trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 2, **options: Any) -> pl.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def lora(**options: Any) -> LoRACallback:
    merge = options.pop("merge_on_fit_end", False)
    config = LoRAConfig(**{"rank": 2, "alpha": 8.0, **options})
    return LoRACallback(config, merge_on_fit_end=merge, print_report=False)


def best_and_last(folder: Path, **options: Any) -> ModelCheckpoint:
    settings: dict[str, Any] = {"monitor": "val_loss", "save_top_k": -1, "save_last": True, "filename": "{epoch}"}
    return ModelCheckpoint(dirpath=folder, **{**settings, **options})


def silence() -> None:
    """For the processes that tests start."""
    warnings.simplefilter("ignore")
