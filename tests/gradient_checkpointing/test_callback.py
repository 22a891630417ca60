"""Gradient checkpointing as an argument of the callback, in real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import GradientCheckpointingConfig, LoRACallback, LoRAConfig, TargetNotFoundError
from lightning_lora.gradient_checkpointing import recomputed_blocks
from tests.integration.lives import LIGHTNINGS_ADVICE, best_and_last, quiet_trainer
from tests.states import adapters_of, same

pytestmark = LIGHTNINGS_ADVICE
WIDTH = 16


class Blocks(pl.LightningModule):
    """Repeated blocks with dropout; counts how often one is computed in a training step."""

    def __init__(self, *, lazy: bool = False) -> None:
        super().__init__()
        self.lazy, self.calls, self.seen = lazy, 0, []
        if not lazy:
            self.build()

    def build(self) -> None:
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2)) for _ in range(3)
        )
        self.blocks[0][1].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def configure_model(self) -> None:
        if not hasattr(self, "blocks"):
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.calls = 0
        return (self(batch) - 1).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.calls)

    def validation_step(self, batch: Any, index: int) -> None:
        self.calls = 0
        self.log("val_loss", (self(batch) - 1).square().mean())
        self.seen.append(-self.calls)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def rows() -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3)), batch_size=4)


def fitted(folder: Path, checkpointing: Any, *, module: Blocks | None = None, **options: Any) -> Blocks:
    module = module or Blocks()
    callback = LoRACallback(
        LoRAConfig(rank=2, dropout=0.1), gradient_checkpointing=checkpointing, print_report=False, **options
    )
    torch.manual_seed(7)
    quiet_trainer(folder, callback, best_and_last(folder)).fit(module, rows(), rows())
    return module


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "configure_model"])
def test_the_run_is_bitwise_the_one_without_and_blocks_are_recomputed_in_training_only(
    lazy: bool, tmp_path: Path
) -> None:
    without = fitted(tmp_path / "without", False, module=Blocks(lazy=lazy))
    module = fitted(tmp_path / "with", True, module=Blocks(lazy=lazy))
    assert same(adapters_of(module), adapters_of(without))
    assert without.seen == [1, 1, -1, -1] * 2
    assert module.seen == [2, 2, -1, -1] * 2


def test_after_the_run_nothing_is_left_of_it(tmp_path: Path) -> None:
    module = fitted(tmp_path, True)
    assert not recomputed_blocks(module)
    assert all("forward" not in vars(child) for child in module.modules())


def test_after_an_exception_nothing_is_left_of_it(tmp_path: Path) -> None:
    class Failing(Blocks):
        def on_train_epoch_end(self) -> None:
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, True, module=module)
    assert not recomputed_blocks(module)


def test_the_merge_at_fit_end_is_that_of_the_run_without(tmp_path: Path) -> None:
    merged = [
        fitted(tmp_path / str(checkpointing), checkpointing, merge_on_fit_end=True) for checkpointing in (False, True)
    ]
    assert same(merged[0].state_dict(), merged[1].state_dict())


def test_fields_of_the_config_say_which_blocks(tmp_path: Path) -> None:
    module = fitted(tmp_path, GradientCheckpointingConfig(blocks=("blocks.1",)))
    assert module.seen == [1, 1, -1, -1] * 2


def test_blocks_that_are_nowhere_are_refused_before_the_training(tmp_path: Path) -> None:
    module = Blocks()
    with pytest.raises(TargetNotFoundError, match="layres"):
        fitted(tmp_path, GradientCheckpointingConfig(blocks=("layres.0",)), module=module)
    assert module.seen == []
    assert not adapters_of(module)


def test_blocks_that_are_never_called_are_warned_of(tmp_path: Path) -> None:
    class Bypassing(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                for layer in block:  # so that no block's forward runs
                    x = layer(x)
            return x

    with pytest.warns(UserWarning, match=r"3 blocks that gradient checkpointing .* such as 'blocks.0'"):
        fitted(tmp_path, True, module=Bypassing())
