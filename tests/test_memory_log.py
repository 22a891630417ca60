"""The plan of a fit's memory is logged beside what was measured, and the fit is the same with it."""

from __future__ import annotations

import logging
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, QuantizationConfig
from lightning_lora.device_memory import PeakMeter

WIDTH = 64


class Mixing(pl.LightningModule):
    """A step that draws numbers of torch, numpy and Python, and looks at no values."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 256), nn.Dropout(0.5), nn.ReLU(), nn.Linear(256, 3))
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        scale = 1 + random.random() + float(np.random.rand()) + 0.1 * torch.randn(())
        loss = nn.functional.cross_entropy(self.net(x * scale), y)
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module, folder, *, rows=32, accumulate=1, precision="32-true", **callback):
    lora = LoRACallback(LoRAConfig(rank=2, dropout=0.1), print_report=False, **callback)
    data = TensorDataset(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(rows) % 3)
    logger = CSVLogger(folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        callbacks=[lora],
        accumulate_grad_batches=accumulate,
        precision=precision,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    return lora, {key: value for row in logger.experiment.metrics for key, value in row.items()}


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [(None, "32-true"), (None, "bf16-mixed"), (QuantizationConfig(), "32-true")],
    ids=["dense", "dense-mixed", "nf4"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_planned_and_measured_peak_are_logged_early_in_a_fit(tmp_path, caplog, quantization, accumulate, precision):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    metrics = []
    logged = CSVLogger.log_metrics

    def record(self, values, step=None):
        metrics.append((step, values))
        logged(self, values, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CSVLogger, "log_metrics", record)
        lora, _ = fit(
            Mixing(), tmp_path, quantization=quantization, accumulate=accumulate, precision=precision, log_memory=True
        )
    (found,) = [(step, values) for step, values in metrics if "lora/planned_peak_bytes" in values]
    assert found[0] == 2  # the first step finds no states of the optimizer yet
    assert found[1]["lora/planned_peak_bytes"] == lora.memory_plan.peak
    assert found[1]["lora/measured_peak_bytes"] == pytest.approx(lora.memory_plan.peak, rel=0.1)
    assert "planned" in caplog.text and "measured" in caplog.text
    assert lora.memory_plan.settings["adapters"] == "lora rank 2"
    assert lora.memory_plan.settings["batch"] == "(4, 64), (4,)"
    assert bool(lora.memory_plan.base.codes) == (quantization is not None)


def test_the_fit_is_the_same_bit_for_bit(tmp_path):
    runs = []
    for log_memory in (False, True):
        pl.seed_everything(1)
        module = Mixing()
        fit(module, tmp_path, log_memory=log_memory)
        runs.append(module)
    assert len(runs[0].losses) == 8
    assert all(torch.equal(a, b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    first, second = (run.state_dict() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_step_that_cannot_be_planned_trains_and_is_measured_and_the_log_says_why(tmp_path, caplog):
    class Looking(Mixing):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.last = int(loss > 1)
            return loss

    caplog.set_level(logging.INFO, logger="lightning_lora")
    module = Looking()
    lora, metrics = fit(module, tmp_path, log_memory=True)
    assert lora.memory_plan is None
    assert "No plan of this fit's memory" in caplog.text and "only a real run has" in caplog.text
    assert "lora/planned_peak_bytes" not in metrics
    assert len(module.losses) == 8


def test_a_step_that_fails_while_it_is_measured_leaves_no_profiler_behind(tmp_path):
    class Failing(Mixing):
        def training_step(self, batch, index):
            if self.global_step == 1:
                raise ZeroDivisionError
            return super().training_step(batch, index)

    with pytest.raises(ZeroDivisionError):
        fit(Failing(), tmp_path, log_memory=True)
    assert not torch.autograd.profiler._is_profiler_enabled


def test_nothing_is_planned_unless_asked(tmp_path):
    lora, _ = fit(Mixing(), tmp_path)
    assert lora.memory_plan is None


def test_a_peak_is_what_was_held_and_the_most_that_came():
    held = torch.ones(1000)
    meter = PeakMeter(torch.device("cpu"))
    meter.start([held, held[:10]])
    first = torch.ones(50_000)
    del first
    second = torch.ones(20_000)
    assert meter.stop() == 4 * (1000 + 50_000)
    assert meter.stop() is None
    del second


def test_nothing_is_measured_under_the_profiler_of_the_user():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        meter = PeakMeter(torch.device("cpu"))
        meter.start([])
        assert meter.stop() is None
