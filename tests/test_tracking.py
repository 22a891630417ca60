"""Hyper-parameters, trainable share, tables and checkpoint size reach every kind of logger, for real."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_lora.tracking import log_checkpoint_bytes, log_merge, log_run

HYPERPARAMETERS = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "layers": None}


class LayerTable:
    """A report as plain data."""

    def __init__(self, **content: Any) -> None:
        self.content = content

    def to_dict(self) -> dict[str, Any]:
        return self.content


INJECTION = LayerTable(
    layers=[
        {"name": "layers.0", "kind": "lora", "shape": [16, 32], "rank": 4, "alpha": 8.0, "trainable": 192},
        {"name": "layers.1", "kind": "lora", "shape": [16, 16], "rank": 4, "alpha": 8.0, "trainable": 128},
    ],
    skipped={"head": "an output head"},
    trainable_parameters=320,
    total_parameters=1280,
)
MERGE = LayerTable(
    layers=[{"name": "layers.0", "update": 0.5, "weight": 4.0, "error": 1e-7}],
    relative_error=1e-7,
    max_relative_error=1e-7,
    output_difference={"max_abs": 2e-6, "relative": 1e-6},
    folder="merged",
)


def trainer_with(loggers: list[Logger], folder: Path) -> L.Trainer:
    return L.Trainer(
        logger=loggers, default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, max_epochs=1
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def log_everything(trainer: L.Trainer) -> None:
    log_run(trainer, hyperparameters=HYPERPARAMETERS, report=INJECTION)
    for logger in trainer.loggers:
        logger.log_metrics({"train/loss": 1.0}, step=1)  # a training run logs its own metrics in between
        logger.save()
    log_checkpoint_bytes(trainer, 4096)
    log_merge(trainer, MERGE)
    for logger in trainer.loggers:
        logger.finalize("success")


def test_csv_logger_gets_hyperparameters_metrics_and_a_table_as_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    log_everything(trainer_with([logger], tmp_path))

    folder = Path(logger.log_dir)
    lora = yaml.safe_load((folder / "hparams.yaml").read_text())["lora"]
    assert lora["rank"] == 4
    assert lora["target_modules"] == ["q_proj", "v_proj"]
    assert lora["trainable_share"] == pytest.approx(0.25)
    assert lora["trainable_parameters"] == 320
    rows = read_csv(folder / "lora_injection.csv")
    assert [(row["name"], row["shape"], row["rank"]) for row in rows] == [
        ("layers.0", "16 x 32", "4"),
        ("layers.1", "16 x 16", "4"),
    ]
    logged = [row for row in read_csv(folder / "metrics.csv") if row["lora/checkpoint_bytes"]]
    assert float(logged[0]["lora/checkpoint_bytes"]) == 4096


def test_tensorboard_gets_hyperparameters_metrics_and_a_text_table(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="tensorboard", default_hp_metric=False)
    log_everything(trainer_with([logger], tmp_path))

    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    assert events.Scalars("lora/checkpoint_bytes")[0].value == 4096
    assert events.Scalars("lora/merge_max_relative_error")[0].value == pytest.approx(1e-7)
    text = events.Tensors("lora/injection/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| layers.0 | lora | 16 x 32 | 4 | 8.0 | 192 |" in text
    hyperparameters = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert hyperparameters["lora"]["trainable_share"] == pytest.approx(0.25)


def test_wandb_offline_run_gets_hyperparameters_metrics_and_a_table(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    try:
        log_everything(trainer_with([logger], tmp_path))
        lora = dict(logger.experiment.config)["lora"]
        summary = dict(logger.experiment.summary)
        folder = Path(logger.experiment.dir)
    finally:
        wandb.finish()

    assert lora["rank"] == 4
    assert lora["trainable_share"] == pytest.approx(0.25)
    assert summary["lora/checkpoint_bytes"] == 4096
    (table,) = folder.glob("media/table/lora/injection*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["name", "kind", "shape", "rank", "alpha", "trainable"]
    assert content["data"][0] == ["layers.0", "lora", "16 x 32", 4, 8.0, 192]


def test_several_loggers_at_once_all_get_everything(tmp_path: Path) -> None:
    loggers: list[Logger] = [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    log_everything(trainer_with(loggers, tmp_path))

    one, two = (Path(str(logger.log_dir)) for logger in loggers)
    for name in ("hparams.yaml", "metrics.csv", "lora_injection.csv", "lora_merge.csv"):
        assert (one / name).read_text() == (two / name).read_text()


class PlainLogger(Logger):
    """A logger of someone else: it has what the interface asks for, and nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.hyperparameters: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "plain"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hyperparameters.update(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.update(metrics)


def test_an_unknown_logger_gets_hyperparameters_and_metrics(tmp_path: Path) -> None:
    logger = PlainLogger()
    log_everything(trainer_with([logger], tmp_path))

    assert logger.hyperparameters["lora"]["adapted_layers"] == 2
    assert logger.metrics["lora/checkpoint_bytes"] == 4096
    assert logger.metrics["lora/merge_output_max_abs"] == 2e-6


def test_a_merge_whose_outputs_were_not_compared_logs_no_number_for_them(tmp_path: Path) -> None:
    logger = PlainLogger()
    log_merge(trainer_with([logger], tmp_path), LayerTable(**{**MERGE.content, "output_difference": None}))

    assert set(logger.metrics) == {"lora/merge_relative_error", "lora/merge_max_relative_error"}


@pytest.mark.parametrize(("rank", "logs"), [(0, True), (1, False)])
def test_only_rank_zero_logs(rank: int, logs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)  # restored at the end
    logger = PlainLogger()
    trainer = L.Trainer(logger=[logger], default_root_dir=tmp_path, accelerator="cpu", strategy="ddp", devices=2)
    trainer.strategy.cluster_environment.set_global_rank(rank)
    log_run(trainer, hyperparameters=HYPERPARAMETERS, report=INJECTION)
    log_checkpoint_bytes(trainer, 4096)
    log_merge(trainer, MERGE)

    assert bool(logger.hyperparameters) is logs
    assert bool(logger.metrics) is logs


def test_the_loggers_of_the_other_distribution_get_their_tables_too(tmp_path: Path) -> None:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path, name="csv")
    trainer = pytorch_lightning.Trainer(logger=logger, default_root_dir=tmp_path, accelerator="cpu")
    log_everything(trainer)

    assert [row["name"] for row in read_csv(Path(logger.log_dir) / "lora_injection.csv")] == ["layers.0", "layers.1"]


def test_a_trainer_without_loggers_is_fine(tmp_path: Path) -> None:
    log_everything(L.Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu"))
