"""Small runs with a swapped optimizer, in this process and in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.optimizer_swap import OptimizerConfig, swap_optimizers
from tests.conftest import make_loader
from tests.integration.lives import Recorder, quiet_trainer, silence
from tests.states import adapters_of

SMALL, LARGE = 16, 512  # adapters of rank 8 have at most 128 values, which keep fp32 moments; or 4096 and 1024
EPOCHS = 3
STEPS = 4  # an epoch

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda o: None,
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.8)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.02, total_steps=EPOCHS * STEPS + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5, factor=0.3),
}


class Net(pl.LightningModule):
    """Two layers, and the optimizer of any user."""

    def __init__(
        self, width: int = SMALL, schedule: str = "constant", *, lr: float = 1e-2, fused: bool | None = None
    ) -> None:
        super().__init__()
        self.width, self.schedule, self.lr, self.fused = width, schedule, lr, fused
        self.settings: list[tuple[float, tuple[float, float]]] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width // 4))
            self.head = nn.Linear(width // 4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.head(self.body(batch[0])).float(), batch[1].float())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        groups = self.trainer.optimizers[0].param_groups
        self.settings += [(group["lr"], tuple(group["betas"])) for group in groups]
        return loss

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.body[0].parameters(), "weight_decay": 0.1},
            {
                "params": [*self.body[2].parameters(), *self.head.parameters()],
                "lr": 3e-3,
                "betas": (0.8, 0.95),
                "eps": 1e-4,
            },
        ]
        self.made = torch.optim.AdamW(groups, lr=self.lr, fused=self.fused)
        schedule = SCHEDULES[self.schedule](self.made)
        if schedule is None:
            return self.made
        interval = "epoch" if self.schedule == "ReduceLROnPlateau" else "step"
        how = {"scheduler": schedule, "interval": interval, "monitor": "train_loss"}
        return {"optimizer": self.made, "lr_scheduler": how}


def swapping(optimizer: Any = "adamw8bit", **options: Any) -> LoRACallback:
    """A callback with another optimizer class."""
    return LoRACallback(LoRAConfig(rank=8, alpha=16.0, **options), optimizer=optimizer, print_report=False)


def swap(*optimizers: Optimizer, kind: str = "adamw8bit") -> pl.Trainer:
    """Swap optimizers as a run of a Trainer would, without the run."""
    trainer = quiet_trainer(Path())
    trainer.strategy.optimizers = list(optimizers)
    swap_optimizers(trainer, OptimizerConfig(kind=kind))
    return trainer


def fit(
    folder: Path,
    module: pl.LightningModule,
    optimizer: Any,
    *,
    epochs: int = EPOCHS,
    resume: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Fit, and keep the checkpoint of every epoch."""
    keeper = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    with isolate_rng():
        pl.seed_everything(0, verbose=False)
        trainer = quiet_trainer(folder, swapping(optimizer), keeper, epochs=epochs, logger=Recorder(), **options)
        width = getattr(module, "width", SMALL)
        trainer.fit(module, make_loader(rows=8 * STEPS, width=width), ckpt_path=resume)
    return trainer


def outcome(
    folder: Path, width: int, kind: str | None, schedule: str, epochs: int = EPOCHS, resume: Any = None
) -> dict[str, Any]:
    """Everything of a run that has to be equal."""
    silence()
    module = Net(width, schedule)
    trainer = fit(folder, module, kind, epochs=epochs, resume=resume)
    return {
        "adapters": adapters_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "losses": trainer.logger.of("train_loss_step"),  # type: ignore[union-attr]
        "settings": module.settings,
    }
