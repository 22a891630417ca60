"""Hazard: a module that recomputes activations over a frozen input."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lora import inject_adapters
from tests.conftest import WIDTH
from tests.hazards.runs import lora, trained


class Recomputing(pl.LightningModule):
    """An embedding and a block whose activations are recomputed in the backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(9, WIDTH)
            self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.reentrant is None:
            return self.block(hidden)
        return checkpoint(self.block, hidden, use_reentrant=self.reentrant)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return (self(tokens) - 1.0).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def tokens() -> DataLoader[Any]:
    return DataLoader(torch.arange(27).reshape(9, 3) % 9, batch_size=3)  # type: ignore[arg-type]


def gradients(reentrant: bool | None, *, autocast: bool) -> dict[str, Tensor]:
    module = Recomputing(reentrant)
    inject_adapters(module, lora(dropout=0.3).config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("lora_B"):
                parameter.fill_(0.1)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = module.training_step(torch.arange(9)[None], 0)
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_recomputed_gradients_are_bitwise_those_of_kept_activations_with_dropout(autocast: bool) -> None:
    kept, recomputed = gradients(None, autocast=autocast), gradients(False, autocast=autocast)
    assert len(kept) == 4
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_a_module_that_recomputes_trains_under_the_callback(make_trainer: Any) -> None:
    module = Recomputing(False)
    make_trainer(callbacks=[lora()]).fit(module, tokens())
    assert trained(module)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_recomputation_over_a_frozen_input_fails_with_the_remedy(make_trainer: Any) -> None:
    with pytest.raises(RuntimeError, match="use_reentrant=True also cuts a frozen input off: pass False"):
        make_trainer(callbacks=[lora()]).fit(Recomputing(True), tokens())
