"""Hazard: adapters loaded into a base that they are merged into already: garbage, silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    AdapterMismatchError,
    BaseMismatchError,
    MergeConfig,
    MergeError,
    inject_adapters,
    remove_adapters,
)
from lightning_lora.merging import is_merged
from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric
from tests.states import base_of, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


class Wrecked(TinyModule):
    """Its last epoch ruins the adapters, so that the best is not the last."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            with torch.no_grad():
                for key, value in self.state_dict().items():
                    if ".lora_" in key:
                        value.mul_(50.0)


def run(make_trainer: Any, folder: Path, merge: Any) -> tuple[TinyModule, Any, ModelCheckpoint]:
    module, saver = Wrecked(), ModelCheckpoint(dirpath=folder / "saved", monitor="val_loss", save_last=True)
    trainer = make_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[lora(merge=merge), saver])
    fit(trainer, module)
    return module, trainer, saver


@pytest.mark.parametrize("source", ["last", "best"])
def test_the_best_checkpoint_scores_after_a_merge_what_it_scored_before(
    make_trainer: Any, tmp_path: Path, source: str
) -> None:
    loader = make_loader()
    plain, trainer, _ = run(make_trainer, tmp_path / "plain", False)
    expected = metric(trainer.test(plain, loader, ckpt_path="best", verbose=False))
    module, trainer, _ = run(make_trainer, tmp_path / "merged", MergeConfig(source=source))
    assert is_merged(module)
    assert metric(trainer.test(module, loader, ckpt_path="best", verbose=False)) == expected


def test_source_best_merges_the_best_and_not_the_last(make_trainer: Any, tmp_path: Path) -> None:
    module, trainer, saver = run(make_trainer, tmp_path, MergeConfig(source="best"))
    found = metric(trainer.validate(module, make_loader(), verbose=False))
    assert found == pytest.approx(float(saver.best_model_score), rel=1e-4)


def test_a_file_saved_after_the_merge_is_adapter_only_still(make_trainer: Any, tmp_path: Path) -> None:
    module, trainer, _ = run(make_trainer, tmp_path, True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert is_merged(module)
    assert is_adapter_only(tmp_path / "after.ckpt")


def test_a_merged_base_in_a_new_process_refuses_the_adapters_it_contains(make_trainer: Any, tmp_path: Path) -> None:
    module, _, saver = run(make_trainer, tmp_path, True)
    again = TinyModule()
    again.load_state_dict({key: value.clone() for key, value in module.state_dict().items()})
    inject_adapters(again, lora().config)
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        make_trainer(callbacks=[lora()]).test(again, make_loader(), ckpt_path=saver.best_model_path)


def test_a_refused_file_leaves_a_merged_module_merged(make_trainer: Any, tmp_path: Path) -> None:
    module, _, _ = run(make_trainer, tmp_path, True)
    other = make_trainer(callbacks=[lora(rank=3)])
    fit(other, TinyModule())
    other.save_checkpoint(tmp_path / "other.ckpt")
    merged = base_of(module)
    flags = [(name, p.requires_grad) for name, p in module.named_parameters()]
    with pytest.raises(AdapterMismatchError):
        make_trainer(callbacks=[lora()]).test(module, make_loader(), ckpt_path=tmp_path / "other.ckpt")
    assert is_merged(module)
    assert same(module.state_dict(), merged)
    assert [(name, p.requires_grad) for name, p in module.named_parameters()] == flags


def test_a_second_fit_does_not_mix_weights_loaded_after_the_merge_with_the_old_base(
    make_trainer: Any, tmp_path: Path
) -> None:
    module, _, _ = run(make_trainer, tmp_path, True)
    loaded = {key: torch.full_like(value, 0.5) for key, value in module.state_dict().items()}
    module.load_state_dict(loaded)
    with pytest.raises(MergeError, match=r"not the merged one any more.*remove_adapters\(module\)"):
        fit(make_trainer(callbacks=[lora()]), module)
    assert same(module.state_dict(), loaded)
    remove_adapters(module)
    fit(make_trainer(callbacks=[lora()]), module)
    assert same(base_of(module), loaded)


def test_saving_a_merged_module_changes_no_bit_flag_or_gradient_of_it(make_trainer: Any, tmp_path: Path) -> None:
    module, trainer, _ = run(make_trainer, tmp_path, True)
    module.backbone[0].weight.requires_grad_(False)
    gradient = torch.ones_like(module.head.weight)
    module.head.weight.grad = gradient
    before, data = base_of(module), module.head.weight.data_ptr()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert is_adapter_only(tmp_path / "after.ckpt")
    assert same(module.state_dict(), before)
    assert module.head.weight.data_ptr() == data
    assert module.head.weight.grad is gradient
    assert not module.backbone[0].weight.requires_grad
