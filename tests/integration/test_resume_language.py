"""A resumed run of a transformer, whose q, k and v share an input, equals one that never stopped, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lora import LoRACallback, LoRAConfig, QuantizationConfig
from lightning_lora.layers import adapted_layers
from tests.integration.language import Language, token_loader
from tests.integration.lives import LIGHTNINGS_ADVICE, best_and_last, quiet_trainer
from tests.states import adapters_of, same

pytestmark = LIGHTNINGS_ADVICE


def outcome(folder: Path, *, epochs: int, precision: str, nf4: bool, recompute: bool, resume: Any = None) -> Any:
    with isolate_rng():
        pl.seed_everything(7 if resume is None else 99, verbose=False)
        callback = LoRACallback(
            LoRAConfig(rank=2, dropout=0.1),
            quantization=QuantizationConfig() if nf4 else None,
            gradient_checkpointing=recompute,
            print_report=False,
        )
        module = Language("llama-wide" if nf4 else "llama")
        trainer = quiet_trainer(folder, callback, best_and_last(folder), epochs=epochs, precision=precision)
        trainer.fit(module, token_loader(), token_loader(), ckpt_path=resume)
    assert sum(bool(layer.followers) for _, layer in adapted_layers(module)) >= 4  # else nothing is shared
    return {
        "adapters": adapters_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "loss": trainer.callback_metrics["val_loss"],
    }


CASES = [("32-true", False), ("bf16-true", False), ("bf16-mixed", False), ("bf16-mixed", True)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("precision", "nf4"), CASES)
def test_one_epoch_and_a_resume_equal_two_epochs(precision: str, nf4: bool, recompute: bool, tmp_path: Path) -> None:
    if nf4:
        pytest.importorskip("bitsandbytes")
    how: dict[str, Any] = {"precision": precision, "nf4": nf4, "recompute": recompute}
    whole = outcome(tmp_path / "whole", epochs=2, **how)
    outcome(tmp_path / "half", epochs=1, **how)
    resumed = outcome(tmp_path / "half", epochs=2, resume=tmp_path / "half" / "epoch=0.ckpt", **how)
    assert {key: same(resumed[key], whole[key]) for key in whole} == dict.fromkeys(whole, True)
