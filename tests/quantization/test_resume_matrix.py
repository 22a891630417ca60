"""Resume over every pair of base format and optimizer, with and without recomputation: bitwise, all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, QuantizationConfig
from tests.integration.lives import LIGHTNINGS_ADVICE, Recorder, best_and_last, quiet_trainer
from tests.quantization.quantized import FORMATS, codes_of
from tests.states import adapters_of, same

pytest.importorskip("bitsandbytes")
pytestmark = [*LIGHTNINGS_ADVICE, pytest.mark.filterwarnings("ignore:optimizer=.paged_:UserWarning")]
WIDTH, RANK = 576, 8  # adapter tensors of 4608 values: from 4096 on their moments have 8 bits


class Blocks(pl.LightningModule):
    """Repeated blocks with dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)
            )

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        x = batch
        for block in self.blocks:
            x = x + block(x)
        loss = (x - 1).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.blocks[0](batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


def rows(*, shuffle: bool) -> torch.utils.data.DataLoader[Tensor]:
    data: Any = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=shuffle)


def outcome(folder: Path, form: str, optimizer: str, recompute: bool, *, epochs: int, resume: Any = None) -> Any:
    """Everything of a run that has to be equal."""
    with isolate_rng():
        pl.seed_everything(7 if resume is None else 99, verbose=False)
        callback = LoRACallback(
            LoRAConfig(rank=RANK, dropout=0.1),
            quantization=QuantizationConfig(**FORMATS[form]),
            gradient_checkpointing=recompute,
            optimizer=optimizer,
            print_report=False,
        )
        module, recorder = Blocks(), Recorder()
        saver = best_and_last(folder)
        trainer = quiet_trainer(folder, callback, saver, epochs=epochs, logger=recorder)
        trainer.fit(module, rows(shuffle=True), rows(shuffle=False), ckpt_path=resume)
    return {
        "adapters": adapters_of(module),
        "codes": codes_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "last losses": recorder.of("train_loss")[-2:],
    }


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw8bit"])
@pytest.mark.parametrize("form", FORMATS)
def test_one_epoch_and_a_resume_equal_two_epochs(form: str, optimizer: str, recompute: bool, tmp_path: Path) -> None:
    whole = outcome(tmp_path / "whole", form, optimizer, recompute, epochs=2)
    outcome(tmp_path / "half", form, optimizer, recompute, epochs=1)
    resumed = outcome(
        tmp_path / "half", form, optimizer, recompute, epochs=2, resume=tmp_path / "half" / "epoch=0.ckpt"
    )
    assert {key: same(resumed[key], whole[key]) for key in whole} == dict.fromkeys(whole, True)
    states = [state.get("__bnb_optimizer_quant_state__", state) for state in whole["optimizer"]["state"].values()]
    moments = {value.dtype for state in states for value in state.values() if isinstance(value, Tensor)}
    assert (torch.uint8 in moments) == (optimizer == "paged_adamw8bit")
