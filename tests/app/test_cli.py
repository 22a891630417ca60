"""``lightning-lora`` as a person types it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.app.commands import build_app
from lightning_lora.app.hydra_main import run


def lightning_lora_command(
    *arguments: str, folder: Path, missing: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the console script's function; ``missing`` names packages that shall look as if not installed."""
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    code = f"import sys; {hidden}from lightning_lora.app.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_console_script_is_this_function() -> None:
    from importlib.metadata import entry_points

    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["lightning-lora"] == "lightning_lora.app.cli:main"


def test_the_version_needs_no_hydra(tmp_path: Path) -> None:
    result = lightning_lora_command("--version", folder=tmp_path, missing=["hydra", "omegaconf"])
    assert result.stdout.strip() == lightning_lora.__version__


@pytest.mark.parametrize(
    ("arguments", "package", "extra"), [(["train"], "hydra", "hydra"), (["--help"], "typer", "cli")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    arguments: list[str], package: str, extra: str, tmp_path: Path
) -> None:
    result = lightning_lora_command(*arguments, folder=tmp_path, missing=[package])
    assert result.returncode == 1
    assert f"pip install 'lightning-lora[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_help_lists_the_commands() -> None:
    from typer.testing import CliRunner

    help_page = CliRunner().invoke(build_app(), ["--help"]).stdout
    assert "train" in help_page
    assert "--version" in help_page


def test_an_unknown_option_is_one_message_with_the_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored at the end
    with pytest.raises(SystemExit, match="1"):
        run(["experiment=tinny"])
    message = capsys.readouterr().err
    assert "tiny" in message
    assert "Traceback" not in message


def test_another_projects_config_folder_adds_its_experiments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - tiny\n  - _self_\nadapter:\n  rank: 3\n"
    )
    run(["--config-dir", "mine", "experiment=own", "--cfg", "job"])
    assert "rank: 3" in capsys.readouterr().out


def test_a_bad_value_says_where_it_stands_and_what_is_allowed(tmp_path: Path) -> None:
    result = lightning_lora_command("train", "experiment=tiny", "adapter.rank=0", folder=tmp_path)
    assert result.returncode == 1
    assert "rank must be" in result.stderr
    assert "callbacks.lora.config" in result.stderr


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
