"""Time series: pytorch-forecasting's `TemporalFusionTransformer` on autoregressive series with a season."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytorch_forecasting = pytest.importorskip(
    "pytorch_forecasting", reason="pytorch-forecasting is not installed (see requirements-wild.txt)"
)

import lightning as L  # noqa: E402
import torch  # noqa: E402
from pytorch_forecasting.data.examples import generate_ar_data  # noqa: E402

from lightning_lora import LoRAConfig  # noqa: E402

LORA = LoRAConfig(
    rank=2,
    dropout=0.1,
    target_modules="all-linear",
    # Weighs static variables, of which there is one: its softmax is 1 whatever its layers say.
    exclude_modules=["static_context_variable_selection"],
)
# The package adds objects to its checkpoints, so Lightning itself needs weights_only=False to open them.
PICKLED = True


def _series(first: int, last: int) -> Any:
    table = generate_ar_data(seasonality=10.0, timesteps=60, n_series=16, seed=13)
    table = table[(table.time_idx >= first) & (table.time_idx < last)]
    return pytorch_forecasting.TimeSeriesDataSet(
        table.astype({"series": str}), time_idx="time_idx", target="value", group_ids=["series"],
        static_categoricals=["series"], time_varying_unknown_reals=["value"],
        max_encoder_length=12, max_prediction_length=4, min_encoder_length=12,
    )  # fmt: skip


def build() -> L.LightningModule:
    L.seed_everything(13, verbose=False)
    return pytorch_forecasting.TemporalFusionTransformer.from_dataset(
        _series(0, 20), hidden_size=8, attention_head_size=2, hidden_continuous_size=8, dropout=0.1,
        loss=pytorch_forecasting.QuantileLoss(), learning_rate=0.03, optimizer="adam", log_interval=-1,
    )  # fmt: skip


def loaders() -> dict[str, Any]:
    def loader(first: int, last: int) -> Any:
        return _series(first, last).to_dataloader(train=False, batch_size=16)

    return {"train": loader(0, 20), "val": loader(24, 42), "test": loader(42, 60)}


def outputs(module: L.LightningModule) -> torch.Tensor:
    batch, _ = next(iter(loaders()["test"]))
    return module(batch).prediction


def reopen(path: Path) -> L.LightningModule:
    return pytorch_forecasting.TemporalFusionTransformer.load_from_checkpoint(
        path, map_location="cpu", weights_only=False
    )
