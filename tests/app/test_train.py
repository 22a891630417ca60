"""``train``: one run from a composed configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_lora.app.tiny import TinyClassifier
from lightning_lora.app.train import train

Compose = Callable[..., DictConfig]


def leaves(node: Any) -> Iterator[Any]:
    yield node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(key)
            yield from leaves(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from leaves(value)


def read_metrics(folder: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((folder / "metrics.json").read_text())["metrics"]
    return metrics


def test_train_learns_and_returns_the_metric_that_a_sweep_asks_for(compose: Compose, tmp_path: Path) -> None:
    accuracy = train(compose("report={_target_: tests.app.recording.RecordingReport, output_dir: ${output_dir}}"))

    calls = json.loads((tmp_path / "run" / "report.json").read_text())
    assert accuracy == pytest.approx(calls[1]["test/accuracy"])
    assert accuracy > calls[0]["test/accuracy"] + 0.2
    metrics = read_metrics(tmp_path / "run")
    assert metrics["test/accuracy"] == pytest.approx(accuracy)
    assert {"train/loss", "val/loss", "test/loss"} <= set(metrics)


def test_the_report_sees_the_base_before_fit_and_the_adapted_model_after(compose: Compose, tmp_path: Path) -> None:
    train(compose("report={_target_: tests.app.recording.RecordingReport, output_dir: ${output_dir}}"))
    before, after, written = json.loads((tmp_path / "run" / "report.json").read_text())

    base = TinyClassifier(width=16, depth=2, classes=4)
    config = compose(folder="base")
    from lightning_lora.app.building import build

    features, labels = build(config.data).splits[2].tensors
    accuracy = (base(features).argmax(-1) == labels).float().mean().item()
    assert [call["call"] for call in (before, after, written)] == ["before", "after", "write"]
    assert before["test/accuracy"] == pytest.approx(accuracy)
    assert after["test/loss"] < before["test/loss"]
    assert written["lora"] == "LoRACallback"
    assert written["epochs"] == 4
    assert written["seconds"] > 0


def test_no_optimized_metric_returns_none(compose: Compose) -> None:
    assert train(compose("optimized_metric=null", "trainer.max_epochs=1")) is None


def test_an_optimized_metric_that_was_not_logged_names_those_that_were(compose: Compose) -> None:
    with pytest.raises(ValueError, match=r"test/f1.*test/accuracy"):
        train(compose("optimized_metric=test/f1", "trainer.max_epochs=1"))


def test_unknown_test_weights_are_refused_before_anything_is_built(compose: Compose, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="live, last, best"):
        train(compose("test_weights=newest"))
    assert not (tmp_path / "run").exists()


def test_a_report_without_lora_callback_is_refused_with_what_to_do(compose: Compose) -> None:
    with pytest.raises(ValueError, match="no LoRACallback"):
        train(
            compose(
                "callbacks.lora=null",
                "report={_target_: tests.app.recording.RecordingReport, output_dir: ${output_dir}}",
                "trainer.max_epochs=1",
            )
        )


def test_checkpoints_hold_adapters_only_and_no_omegaconf_container(compose: Compose, tmp_path: Path) -> None:
    config = compose("adapter.target_modules=[layers.0,layers.1]", "+adapter.rank_pattern={layers.1: 2}")
    nested = {"sizes": [1, 2], "options": {"depth": {"a": [3]}}}
    config.model = {"_target_": "tests.app.recording.KeepsNested", **nested}
    config.data.width, config.data.classes = 16, 4
    train(config)
    paths = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert len(paths) == 4 + 1
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"]
        assert all(".adapters.default.lora_" in key for key in checkpoint["state_dict"])
        assert checkpoint["hyper_parameters"]["options"] == {"depth": {"a": [3]}}
        assert not any(OmegaConf.is_config(leaf) for leaf in leaves(checkpoint))


def test_a_run_goes_on_from_its_checkpoint(compose: Compose, tmp_path: Path) -> None:
    train(compose("trainer.max_epochs=2", folder="first"))
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="dirpath has changed"):  # Lightning says so of any new folder
        train(compose(f"ckpt_path={last}", folder="second"))

    stopped = torch.load(last, weights_only=True)
    resumed = torch.load(tmp_path / "second" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["epoch"] == 3
    assert resumed["global_step"] == 2 * stopped["global_step"]
    logged = (tmp_path / "second" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    epochs = {row.split(",")[logged[0].split(",").index("epoch")] for row in logged[1:]}
    assert not epochs & {"0", "1"}, "the first epochs were trained again"


def test_the_weights_that_are_asked_for_are_tested(compose: Compose, tmp_path: Path) -> None:
    scores = {
        weights: train(
            compose(
                "callbacks=default",
                "callbacks.model_checkpoint.monitor=val/loss",
                "model._target_=tests.app.recording.ForgetsAtTheEnd",
                "optimized_metric=test/loss",
                f"test_weights={weights}",
                folder=weights,
            )
        )
        for weights in ("live", "last", "best")
    }
    assert scores["last"] == scores["live"]
    assert scores["last"] > 1.1 * scores["best"]


def test_a_metric_of_a_test_that_is_switched_off_is_refused_before_the_fit(compose: Compose, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimized_metric=null"):
        train(compose("test_after_fit=false"))
    assert not (tmp_path / "run").exists()
    assert train(compose("test_after_fit=false", "optimized_metric=null")) is None
    assert "test/loss" not in read_metrics(tmp_path / "run")


def test_a_report_without_its_second_test_is_refused_before_the_fit(compose: Compose) -> None:
    report = "report={_target_: tests.app.recording.RecordingReport, output_dir: ${output_dir}}"
    with pytest.raises(ValueError, match="report=null"):
        train(compose(report, "test_after_fit=false", "optimized_metric=val/loss"))


def test_the_metrics_of_a_finished_run_survive_a_report_that_fails(compose: Compose, tmp_path: Path) -> None:
    report = "report={_target_: tests.app.recording.FailingReport, output_dir: ${output_dir}}"
    with pytest.raises(RuntimeError, match="no paper"):
        train(compose(report))
    assert read_metrics(tmp_path / "run")["test/accuracy"] > 0


def test_settings_of_a_callback_that_is_not_chosen_are_refused(compose: Compose) -> None:
    with pytest.raises(ValueError, match=r"'model_checkpoint' has settings .* no _target_"):
        train(compose("callbacks=lora"))


def test_the_merged_file_opens_in_the_original_class(compose: Compose, tmp_path: Path) -> None:
    loss = train(compose("optimized_metric=test/loss"))
    model = TinyClassifier.load_from_checkpoint(tmp_path / "run" / "merged" / "merged.ckpt")

    from lightning_lora.app.building import build

    features, labels = build(compose(folder="other").data).splits[2].tensors
    with torch.no_grad():
        merged_loss = torch.nn.functional.cross_entropy(model(features), labels).item()
    assert merged_loss == pytest.approx(loss, rel=1e-4)


def test_a_dry_run_writes_no_checkpoint(compose: Compose, tmp_path: Path) -> None:
    train(compose("debug=fast"))
    assert not list((tmp_path / "run").rglob("*.ckpt"))
