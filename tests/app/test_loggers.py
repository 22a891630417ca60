"""Loggers: one run a job, closed whatever happens."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig

from lightning_lora.app.loggers import closing
from lightning_lora.app.train import train

Compose = Callable[..., DictConfig]
OFFLINE = ("logger=wandb", "logger.wandb.offline=true", "trainer.max_epochs=1")


class StatusLogger(CSVLogger):
    """Keeps the statuses with which it was finalised."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.statuses: list[str] = []

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.statuses.append(status)


def test_loggers_end_as_success_after_a_good_block(tmp_path: Path) -> None:
    logger = StatusLogger(tmp_path)
    with closing([logger]):
        logger.log_metrics({"loss": 1.0})
    assert logger.statuses == ["success"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_loggers_end_as_failed_after_any_exception(error: BaseException, tmp_path: Path) -> None:
    loggers = [StatusLogger(tmp_path / "one"), StatusLogger(tmp_path / "two")]
    with pytest.raises(type(error)), closing(loggers):
        raise error
    assert [logger.statuses for logger in loggers] == [["failed"], ["failed"]]


def test_a_logger_that_fails_to_close_hides_neither_the_error_nor_the_others(tmp_path: Path) -> None:
    class Stubborn(StatusLogger):
        def finalize(self, status: str) -> None:
            raise OSError("disk full")

    loggers: list[Logger] = [Stubborn(tmp_path / "one"), StatusLogger(tmp_path / "two")]
    with pytest.raises(RuntimeError, match="the real error"), closing(loggers):
        raise RuntimeError("the real error")
    assert loggers[1].statuses == ["failed"]  # type: ignore[attr-defined]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """W&B offline, without its threads' leftovers in the environment."""
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield module
    module.finish()


def records(path: Path) -> Iterator[bytes]:
    """The records of an offline run's transaction log, which is a LevelDB log behind a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def exit_code(path: Path) -> int:
    """The exit code in an offline run's log, which W&B's own process may still be writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(100):
        for record in map(Record.FromString, records(path)):
            if record.WhichOneof("record_type") == "exit":
                return int(record.exit.exit_code)
        time.sleep(0.1)
    raise AssertionError(f"{path} was never closed")


def exit_codes(folder: Path) -> list[int]:
    return [exit_code(path) for path in sorted(folder.rglob("run-*.wandb"))]


def test_two_jobs_in_one_process_are_two_wandb_runs(compose: Compose, tmp_path: Path, wandb: Any) -> None:
    for index in range(2):
        train(compose(*OFFLINE, folder=f"job{index}"))
        assert wandb.run is None
    runs = [list((tmp_path / f"job{index}").rglob("run-*.wandb")) for index in range(2)]
    assert [len(paths) for paths in runs] == [1, 1]
    assert runs[0][0].name != runs[1][0].name
    assert exit_codes(tmp_path) == [0, 0]


@pytest.mark.parametrize(
    ("model", "message"), [("FailsInTraining", "the data ran dry"), ("FailsInInit", "no such weights")]
)
def test_a_failed_job_closes_its_wandb_run_as_failed(
    model: str, message: str, compose: Compose, tmp_path: Path, wandb: Any
) -> None:
    config = compose(*OFFLINE)
    config.model = {"_target_": f"tests.app.recording.{model}"}
    config.data.width, config.data.classes = 16, 4
    with pytest.raises(Exception, match=message):
        train(config)
    assert wandb.run is None
    assert exit_codes(tmp_path) == [1]


def test_the_whole_configuration_and_the_adapters_numbers_reach_the_csv_logger(
    compose: Compose, tmp_path: Path
) -> None:
    train(compose("trainer.max_epochs=1"))
    folder = tmp_path / "run" / "csv" / "version_0"
    hyperparameters = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert hyperparameters["trainer"]["max_epochs"] == 1
    assert hyperparameters["adapter"]["rank"] == 4
    assert 0 < hyperparameters["lora"]["trainable_share"] < 1
    assert (folder / "lora_injection.csv").read_text().count("\n") > 1
    assert "lora/checkpoint_bytes" in (folder / "metrics.csv").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"] > 0
