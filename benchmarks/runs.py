"""Short Lightning runs that leave something to save."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import models


class Language(L.LightningModule):
    """A plain module around a causal LM, which knows nothing of adapters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad])


def fit(module: L.LightningModule, case: models.Case, *callbacks: L.Callback) -> L.Trainer:
    """Train for two steps, so that optimizer and loops have a state to save."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, DataLoader([row for _ in range(2) for row in case.inputs()["input_ids"]], batch_size=case.batch)
    )
    return trainer


def fit_ours(case: models.Case) -> L.Trainer:
    """A run with ``LoRACallback``."""
    from lightning_lora import LoRACallback, LoRAConfig

    config = LoRAConfig(rank=case.rank, alpha=case.alpha, target_modules=case.linear)
    return fit(Language(models.build_base(case)), case, LoRACallback(config))


def fit_peft(case: models.Case) -> L.Trainer:
    """A run of plain Lightning around PEFT's model."""
    return fit(Language(models.with_peft(models.build_base(case), case)), case)
