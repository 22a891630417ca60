"""Time series again: GluonTS' `PatchTSTLightningModule`; its `nn.TransformerEncoder` has a fused path in eval mode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

patch_tst = pytest.importorskip(
    "gluonts.torch.model.patch_tst.lightning_module", reason="gluonts is not installed (see requirements-wild.txt)"
)

import lightning as L  # noqa: E402
import torch  # noqa: E402
from gluonts.torch.distributions import StudentTOutput  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lightning_lora import LoRAConfig  # noqa: E402

LORA = LoRAConfig(rank=2, dropout=0.1, target_modules="all-linear")
EVALUATE = "validate"  # it has no test_step
PAST, FUTURE = 24, 4


MODEL = {
    "prediction_length": FUTURE,
    "context_length": PAST,
    "patch_len": 8,
    "stride": 4,
    "padding_patch": "end",
    "d_model": 16,
    "nhead": 2,
    "dim_feedforward": 32,
    "dropout": 0.1,
    "activation": "relu",
    "norm_first": False,
    "num_encoder_layers": 2,
    "scaling": "mean",
    "num_feat_dynamic_real": 0,
    "distr_output": StudentTOutput(),
}


def build() -> L.LightningModule:
    L.seed_everything(17, verbose=False)
    return patch_tst.PatchTSTLightningModule(model_kwargs=MODEL, lr=1e-2)


def _waves(first: int, last: int) -> DataLoader[Any]:
    """Sine waves, of which each sample shows a part."""
    hours = torch.arange(PAST + FUTURE, dtype=torch.float32)
    waves = [torch.sin(2 * math.pi * (hours + start) / (6 + start % 5)) + 2 for start in range(first, last)]
    rows = [
        {
            "past_target": wave[:PAST],
            "past_observed_values": torch.ones(PAST),
            "future_target": wave[PAST:],
            "future_observed_values": torch.ones(FUTURE),
        }
        for wave in waves
    ]
    return DataLoader(rows, batch_size=8)


def loaders() -> dict[str, Any]:
    return {"train": _waves(0, 32), "val": _waves(32, 48), "test": _waves(48, 64)}


def outputs(module: Any) -> torch.Tensor:
    batch = next(iter(_waves(64, 72)))
    arguments, loc, scale = module(batch["past_target"], batch["past_observed_values"])
    return torch.cat([*arguments, loc, scale], dim=1)


def reopen(path: Path) -> L.LightningModule:
    # GluonTS saves no hyper-parameters.
    return patch_tst.PatchTSTLightningModule.load_from_checkpoint(path, map_location="cpu", model_kwargs=MODEL)
