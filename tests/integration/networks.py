"""Plain LightningModules that know nothing of LoRA. This file must not import lightning_lora: a test relies on it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 8
ROWS = 32
BATCH = 8
STEPS_PER_EPOCH = ROWS // BATCH


def rows(count: int = ROWS, width: int = WIDTH) -> TensorDataset:
    """A fixed regression problem that the base does not solve."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def loader(count: int = ROWS, **options: Any) -> DataLoader[Any]:
    """The regression problem in a fixed order, unless ``options`` say otherwise."""
    return DataLoader(rows(count), **{"batch_size": BATCH, **options})


class Regression(pl.LightningModule):
    """Backbone and head; the second epoch has a ruinous learning rate, so that the first is the best.

    Args:
        optimizer: Which parameters the optimizer gets: ``"all"``, ``"filtered"`` by requires_grad, ``"groups"`` by
            name, or ``"captured"``: a list made when the network was built.
        algorithm: ``"adamw"`` or ``"sgd"``.
        dropout: Of the base.
        norm: Whether the backbone has a BatchNorm.
        ruin: Factor of the learning rate from the second epoch on.
        fail_at: Step at which the training raises an error.
    """

    def __init__(
        self,
        optimizer: str = "all",
        algorithm: str = "adamw",
        dropout: float = 0.0,
        norm: bool = True,
        ruin: float = 300.0,
        fail_at: int = -1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.captured: list[nn.Parameter] = []

    def build(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            norm = nn.BatchNorm1d(WIDTH) if self.hparams["norm"] else nn.Identity()
            dropout = nn.Dropout(self.hparams["dropout"])
            self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.ReLU(), dropout, nn.Linear(WIDTH, WIDTH))
            self.head = nn.Linear(WIDTH, 1)
        if self.hparams["optimizer"] == "captured":
            self.captured = list(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0]).float(), batch[1].float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self.hparams["fail_at"]:
            raise ZeroDivisionError("the training went wrong")
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def optimized(self) -> Any:
        kind = self.hparams["optimizer"]
        if kind == "captured":
            return self.captured
        if kind == "filtered":
            return [p for p in self.parameters() if p.requires_grad]
        if kind == "groups":
            return [
                {"params": list(self.backbone.named_parameters()), "lr": 0.02},
                {"params": list(self.head.named_parameters()), "lr": 0.001},
            ]
        return self.parameters()

    def configure_optimizers(self) -> Any:
        if self.hparams["algorithm"] == "sgd":
            optimizer: Any = torch.optim.SGD(self.optimized(), lr=0.02, momentum=0.9, weight_decay=0.01)
        else:
            optimizer = torch.optim.AdamW(self.optimized(), lr=0.02, weight_decay=0.1)
        ruin = self.hparams["ruin"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: ruin if epoch else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


class Eager(Regression):
    """Built in ``__init__``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.build()


class Lazy(Regression):
    """Built in ``configure_model``."""

    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            self.build()


class BuiltInSetup(Regression):
    """Built in ``setup``."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "backbone"):
            self.build()


BUILDS: dict[str, type[Regression]] = {"eager": Eager, "configure_model": Lazy, "setup": BuiltInSetup}


def vanilla_state() -> dict[str, Tensor]:
    """The state of the network that every build makes, before anything touched it."""
    return {key: value.clone() for key, value in Eager().state_dict().items()}
