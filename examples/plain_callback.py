"""The smallest use: a LightningModule that knows nothing of LoRA, and one callback.

Run it: python examples/plain_callback.py
"""

from __future__ import annotations

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig


class Regressor(L.LightningModule):
    """Any LightningModule: two layers, a head, all parameters in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features, targets = batch
        loss = nn.functional.mse_loss(self.head(self.body(features)), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> LoRACallback:
    """Fit the regressor's adapters and print what was adapted."""
    L.seed_everything(0, verbose=False)
    features = torch.randn(256, 8)
    data = DataLoader(TensorDataset(features, features.sum(1, keepdim=True)), batch_size=32)

    lora = LoRACallback(LoRAConfig(rank=4, alpha=8, target_modules=["body.*"], modules_to_save=["head"]))
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, callbacks=[lora])
    trainer.fit(Regressor(), data)

    Console().print(lora.report)
    return lora


if __name__ == "__main__":
    main()
