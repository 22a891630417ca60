"""Parts that the app's tests name in their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lightning_lora.app.tiny import TinyClassifier


class RecordingReport:
    """The three calls that ``train`` makes to a report, written down in order."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "report.json"
        self.calls: list[dict[str, Any]] = []

    def record_before(self, model: Any, metrics: dict[str, float]) -> None:
        self.calls.append({"call": "before", "model": type(model).__name__, **metrics})

    def record_after(self, model: Any, metrics: dict[str, float]) -> None:
        self.calls.append({"call": "after", "model": type(model).__name__, **metrics})

    def write(self, *, trainer: Any, lora: Any, seconds: float) -> dict[str, Any]:
        self.calls.append(
            {
                "call": "write",
                "lora": type(lora).__name__,
                "epochs": trainer.current_epoch,
                "seconds": seconds,
            }
        )
        self.path.write_text(json.dumps(self.calls))
        return {}


class FailingReport(RecordingReport):
    """A report that can't be written."""

    def write(self, *, trainer: Any, lora: Any, seconds: float) -> dict[str, Any]:
        raise RuntimeError("no paper")


class ForgetsAtTheEnd(TinyClassifier):
    """A module whose last epoch wipes the adapters, so that the best is not the last."""

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking and self.current_epoch == self.trainer.max_epochs - 1:
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if name.endswith(".lora_B"):
                        parameter.zero_()


class KeepsNested(TinyClassifier):
    """A module whose hyper-parameters hold a list and a dict, as Hydra would hand them over."""

    def __init__(self, *, sizes: list[int], options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()


class FailsInTraining(TinyClassifier):
    """A module whose second training step raises."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("the data ran dry")
        return super().training_step(batch, batch_idx)


class FailsInInit(TinyClassifier):
    """A module that can't be built."""

    def __init__(self) -> None:
        raise RuntimeError("no such weights")
