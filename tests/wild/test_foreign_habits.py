"""What other people's modules do to their parameters, met with a refusal rather than a run that trains nothing."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, UnsupportedSetupError
from tests.wild.life import load_case

CASES = Path(__file__).parent / "cases"


def _trainer(lora: LoRACallback, folder: Path) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[lora],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_adapters_in_a_backbone_that_the_module_leaves_out_of_its_optimizer_are_refused(tmp_path: Path) -> None:
    vision = load_case(CASES / "vision.py")
    backbone = vision.build().head[0]
    module = type(vision.build())(head=nn.Linear(32, 10), criterion=nn.CrossEntropyLoss(), backbone=backbone)
    lora = LoRACallback(
        LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"], modules_to_save=["head"]), print_report=False
    )
    with pytest.raises(UnsupportedSetupError, match=r"in no optimizer.*backbone"):
        _trainer(lora, tmp_path).fit(module, vision.loaders()["train"])


def test_a_backbone_frozen_by_the_module_itself_gets_adapters_that_train(tmp_path: Path) -> None:
    vision = load_case(CASES / "vision.py")
    module = vision.build()
    for parameter in module.head[0].parameters():
        parameter.requires_grad_(False)
    lora = LoRACallback(vision.LORA, print_report=False)
    _trainer(lora, tmp_path).fit(module, vision.loaders()["train"])
    trained = [value for key, value in module.state_dict().items() if key.endswith("lora_B")]
    assert trained and all(torch.count_nonzero(value) for value in trained)
