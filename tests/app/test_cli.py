"""``lightning-lora`` as a person types it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_lora
from lightning_lora.app.cli import main
from lightning_lora.app.commands import build_app
from lightning_lora.app.hydra_main import run


def lightning_lora_command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the console script's function in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from lightning_lora.app.cli import main; main()", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """For what needs no process of its own: a folder of its own, and ``sys.argv`` restored at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return monkeypatch


def test_the_console_script_is_this_function() -> None:
    from importlib.metadata import entry_points

    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["lightning-lora"] == "lightning_lora.app.cli:main"


@pytest.mark.parametrize(
    ("arguments", "package", "extra"), [(["train"], "hydra", "hydra"), (["--help"], "typer", "cli")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    arguments: list[str], package: str, extra: str, in_process: pytest.MonkeyPatch
) -> None:
    in_process.setitem(sys.modules, package, None)  # what an import finds where it isn't installed
    in_process.setattr(sys, "argv", ["lightning-lora", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    message = str(stop.value)  # which Python prints to stderr, with exit status 1
    assert f"pip install 'lightning-lora[{extra}]'" in message
    assert "\n" not in message


def test_the_help_lists_the_commands_and_the_version_is_printed() -> None:
    from typer.testing import CliRunner

    help_page = CliRunner().invoke(build_app(), ["--help"]).stdout
    assert "train" in help_page
    assert CliRunner().invoke(build_app(), ["--version"]).stdout.strip() == lightning_lora.__version__


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["experiment=tinny"], ["tiny"]),
        (["experiment=tiny", "adapter.rnak=3"], ["rnak"]),
        (["experiment=tiny", "adapter.rank=0"], ["rank must be", "callbacks.lora.config"]),
        (["experiment=tiny", "adapter.target_modules=[layer.0]"], ["layers.0"]),
        (["experiment=tiny", "ckpt_path=nowhere.ckpt"], ["nowhere.ckpt"]),
    ],
)
def test_bad_input_ends_with_status_1_and_says_what_and_where(
    overrides: list[str], told: list[str], in_process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.run.dir=out"]
    with pytest.raises(SystemExit) as stop:
        run([*overrides, *quiet])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert all(text in message for text in told)


def test_another_projects_config_folder_adds_its_experiments(
    in_process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - tiny\n  - _self_\nadapter:\n  rank: 3\n"
    )
    run(["--config-dir", "mine", "experiment=own", "--cfg", "job"])
    assert "rank: 3" in capsys.readouterr().out


def test_one_run_leaves_its_folder_with_configuration_metrics_and_checkpoints(tmp_path: Path) -> None:
    result = lightning_lora_command("train", "experiment=tiny", "adapter.rank=2", "hydra.run.dir=out", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / ".hydra" / "overrides.yaml").read_text().split() == [
        "-", "experiment=tiny", "-", "adapter.rank=2",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["test/accuracy"] > 0.5
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()
    assert (tmp_path / "out" / "merged" / "merged.ckpt").exists()
    assert "rank: 2" in (tmp_path / "out" / "csv" / "version_0" / "hparams.yaml").read_text()


@pytest.mark.slow
def test_a_multirun_gives_each_job_a_folder_a_logger_run_and_a_row(tmp_path: Path) -> None:
    result = lightning_lora_command(
        "train", "-m", "experiment=tiny", "adapter=lora_tied", "adapter.rank=2,4,8", "trainer.max_epochs=1",
        "logger=many", "logger.wandb.offline=true", "hydra.sweep.dir=sweep", folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for job, rank in enumerate((2, 4, 8)):
        folder = tmp_path / "sweep" / str(job)
        hyperparameters = (folder / "csv" / "version_0" / "hparams.yaml").read_text()
        assert f"rank: {rank}" in hyperparameters
        assert f"alpha: {rank}" in hyperparameters
        assert len(list(folder.rglob("run-*.wandb"))) == 1
        assert len(list(folder.rglob("events.out.tfevents.*"))) >= 1
        assert f"adapter.rank={rank}" in result.stdout
    table = result.stdout[result.stdout.index("sweep") :]
    assert "test/accuracy" in table


@pytest.mark.slow
def test_each_job_of_a_sweep_over_two_processes_trains_its_own_rank(tmp_path: Path) -> None:
    result = lightning_lora_command(
        "train", "-m", "experiment=tiny", "adapter.rank=2,4", "trainer.max_epochs=1", "trainer.devices=2",
        "trainer.strategy=ddp", "callbacks=default", "hydra.sweep.dir=sweep", folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for job, rank in enumerate((2, 4)):
        folder = tmp_path / "sweep" / str(job)
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["state_dict"]["layers.0.adapters.default.lora_A"].shape == (rank, 16)
        assert checkpoint["global_step"] == 2  # 128 rows by batches of 32 over two processes
        assert (folder / "metrics.json").exists()
