"""A Hydra project of someone else's that composes lightning_lora's groups with its own.

Run it: python examples/hydra_project/main.py adapter.rank=2 callbacks.lora.merge_on_fit_end=true
"""

from __future__ import annotations

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Autoencoder(L.LightningModule):
    """This project's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Fit the adapters that the configuration describes, and say how many parameters trained."""
    callbacks = [instantiate(callback, _convert_="all") for callback in config.callbacks.values()]
    trainer = instantiate(config.trainer, callbacks=callbacks, _convert_="all")
    trainer.fit(Autoencoder(), DataLoader(torch.randn(64, 8), batch_size=16))
    print(f"trained {callbacks[0].report.trainable_parameters} parameters")


if __name__ == "__main__":
    main()
