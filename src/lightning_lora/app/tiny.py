"""A model and data that need no download: what ``experiment=tiny`` and the tests train."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class TinyClassifier(LightningModule):
    """A few linear layers with a head; the weights are the same for the same ``seed``.

    Args:
        width: Features of the input and of every hidden layer.
        depth: Hidden layers.
        classes: Outputs of the head.
        learning_rate: Adam's.
        seed: Of the weights.
    """

    def __init__(
        self, *, width: int = 16, depth: int = 2, classes: int = 4, learning_rate: float = 0.02, seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            self.head = nn.Linear(width, classes)
        self.learning_rate = learning_rate
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, features: Tensor) -> Tensor:
        """Map features (batch, width) to logits (batch, classes)."""
        for layer in self.layers:
            features = torch.tanh(layer(features)) + features
        logits: Tensor = self.head(features)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch."""
        features, labels = batch
        loss = nn.functional.cross_entropy(self(features), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all parameters, as if there were no adapters: the callback leaves only theirs."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        features, labels = batch
        logits = self(features)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", nn.functional.cross_entropy(logits, labels))
        self.log(f"{stage}/accuracy", accuracy)


class TinyData(LightningDataModule):
    """Random points, labelled by a random linear rule; train, validation and test rows differ.

    Args:
        rows: Of each split.
        width: Features of a row.
        classes: Labels are in [0, classes).
        batch_size: Of every loader.
        seed: Of points and rule.
    """

    def __init__(
        self, *, rows: int = 128, width: int = 16, classes: int = 4, batch_size: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rule = torch.randn(width, classes, generator=generator)
        features = torch.randn(3, rows, width, generator=generator)
        labels = (features @ rule).argmax(-1)
        self.splits = [TensorDataset(features[index], labels[index]) for index in range(3)]
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training rows."""
        return DataLoader(self.splits[0], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation rows."""
        return DataLoader(self.splits[1], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test rows."""
        return DataLoader(self.splits[2], batch_size=self.batch_size)
