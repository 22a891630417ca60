"""Vision: kaiko-eva's `HeadModule` trains a transformers ViT on real handwritten digits (scikit-learn ships them)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

eva = pytest.importorskip("eva.core.models", reason="kaiko-eva is not installed (see requirements-wild.txt)")
datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (see requirements-wild.txt)")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from eva.core.metrics import structs  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402
from transformers import ViTConfig, ViTModel  # noqa: E402

from lightning_lora import LoRAConfig  # noqa: E402

LORA = LoRAConfig(
    rank=2, dropout=0.1, target_modules="all-linear", exclude_modules=["pooler"], modules_to_save=["head.1"]
)


def _class_token(output: Any) -> torch.Tensor:
    return output.last_hidden_state[:, 0]


def build() -> L.LightningModule:
    L.seed_everything(11, verbose=False)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=8, patch_size=2, num_channels=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ViTModel(config, add_pooling_layer=True).save_pretrained(folder)
        backbone = eva.wrappers.HuggingFaceModel(folder, transforms=_class_token)
    head = nn.Sequential(backbone, nn.Linear(32, 10))
    metrics = structs.MetricsSchema(common=MulticlassAccuracy(num_classes=10))
    return eva.modules.HeadModule(head=head, criterion=nn.CrossEntropyLoss(), metrics=metrics)


def _digits(first: int, last: int) -> DataLoader[Any]:
    digits = datasets.load_digits()
    images = torch.tensor(digits.images[first:last], dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target[first:last])
    return DataLoader([(image, label, {}) for image, label in zip(images, labels)], batch_size=16)


def loaders() -> dict[str, Any]:
    return {"train": _digits(0, 64), "val": _digits(64, 96), "test": _digits(96, 160)}


def outputs(module: L.LightningModule) -> torch.Tensor:
    return module(next(iter(_digits(160, 176)))[0])


def reopen(path: Path) -> L.LightningModule:
    fresh = build()
    return type(fresh).load_from_checkpoint(
        path, head=fresh.head, criterion=fresh.criterion, metrics=fresh._metrics, map_location="cpu"
    )
