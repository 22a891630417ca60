"""Hazard: BatchNorm rewrites its running statistics at every forward, frozen or not: resumed metrics differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import BaseMismatchError, LoRAConfig, inject_adapters, load_from_checkpoint, remove_adapters
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import adapters_of, base_of, read, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
]
NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(WIDTH),
    "momentum None": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "not affine": lambda: nn.BatchNorm1d(WIDTH, affine=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(WIDTH),
}


class WithNorm(TinyModule):
    kind = "BatchNorm1d"
    switching = False

    def build(self) -> None:
        super().build()
        self.backbone.insert(1, NORMS[self.kind]())

    def on_train_epoch_start(self) -> None:
        if self.switching:
            self.train()


def with_norm(kind: str, *, switching: bool = False) -> TinyModule:
    return type("Net", (WithNorm,), {"kind": kind, "switching": switching})()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("switching", [False, True], ids=["", "module calls train()"])
def test_frozen_statistics_do_not_move_and_the_best_file_scores_as_in_the_run(
    make_trainer: Any, tmp_path: Path, kind: str, switching: bool
) -> None:
    module, saver = with_norm(kind, switching=switching), ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    before = base_of(module)
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[lora(), saver])
    fit(trainer, module)
    assert trained(module)
    assert same(base_of(module), before)
    assert is_adapter_only(saver.best_model_path)
    tester = make_trainer(callbacks=[lora()])
    found = metric(tester.validate(with_norm(kind), make_loader(), ckpt_path=saver.best_model_path, verbose=False))
    assert found == float(saver.best_model_score)


def test_norm_layers_that_are_exchanged_after_the_injection_are_frozen_too(make_trainer: Any) -> None:
    class Exchanging(WithNorm):
        """Does what sync_batchnorm=True does between the injection and the first step, which needs GPUs."""

        def on_fit_start(self) -> None:
            self.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(self.backbone)

        def on_train_start(self) -> None:
            self.train()

    module = Exchanging()
    before = base_of(module)
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), module)
    assert isinstance(module.backbone[1], nn.SyncBatchNorm)
    assert trained(module)
    assert same(base_of(module), before)


def test_a_norm_layer_trained_in_full_moves_and_is_saved_with_its_statistics(make_trainer: Any, tmp_path: Path) -> None:
    module, saver = with_norm("BatchNorm1d"), ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(modules_to_save=["backbone.1"]), saver])
    fit(trainer, module)
    assert bool((module.backbone[1].running_mean != 0).any())
    keys = {key for key in read(saver.best_model_path)["state_dict"] if ".lora_" not in key}
    assert keys == {f"backbone.1.{name}" for name in module.backbone[1].state_dict()}
    score = metric(trainer.test(module, make_loader(), verbose=False))
    tester = make_trainer(callbacks=[lora(modules_to_save=["backbone.1"])])
    fresh = with_norm("BatchNorm1d")
    assert metric(tester.test(fresh, make_loader(), ckpt_path=saver.best_model_path, verbose=False)) == score


def test_a_batch_norm_without_running_statistics_stays_as_it_is(make_trainer: Any) -> None:
    class Stateless(TinyModule):
        def build(self) -> None:
            super().build()
            self.backbone.insert(1, nn.BatchNorm1d(WIDTH, track_running_stats=False))

    module = Stateless()
    fit(make_trainer(callbacks=[lora()]), module)
    assert type(module.backbone[1]) is nn.BatchNorm1d
    assert adapters_of(module)


def test_after_a_merge_norm_layers_are_what_they_were(make_trainer: Any) -> None:
    module = with_norm("BatchNorm1d")
    fit(make_trainer(callbacks=[lora(merge=True)]), module)
    assert type(module.backbone[1]) is nn.BatchNorm1d
    module.train()
    module(torch.randn(8, WIDTH))
    assert bool((module.backbone[1].running_mean != 0).any())


class WithMeasuredNorm(WithNorm):
    def build(self) -> None:
        super().build()
        self.backbone[1].running_mean.fill_(1 / 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([value.to(self.dtype) for value in batch], batch_idx)


def test_statistics_that_bf16_true_only_rounds_are_neither_saved_nor_loaded(make_trainer: Any, tmp_path: Path) -> None:
    module, path = WithMeasuredNorm(), tmp_path / "x.ckpt"
    trainer = make_trainer(callbacks=[lora()], precision="bf16-true", limit_val_batches=0)
    fit(trainer, module)
    trainer.save_checkpoint(path)
    assert module.backbone[1].running_mean.dtype == torch.bfloat16
    assert is_adapter_only(path)
    assert same(base_of(load_from_checkpoint(WithMeasuredNorm, path)), WithMeasuredNorm().state_dict())


def test_a_base_with_other_statistics_is_another_base(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[lora()])
    fit(trainer, WithNorm())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(BaseMismatchError, match=r"the values of 1 of 3 buffers differ: backbone\.1\.running_mean"):
        load_from_checkpoint(WithMeasuredNorm, tmp_path / "x.ckpt")


def test_statistics_loaded_after_the_injection_stay_those_of_the_base(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[lora()])
    fit(trainer, WithMeasuredNorm())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = WithNorm()
    module.backbone[0].weight.data.zero_()
    inject_adapters(module, LoRAConfig(rank=2, alpha=4))
    module.load_state_dict({**module.state_dict(), **WithMeasuredNorm().state_dict()})
    make_trainer(callbacks=[lora()]).test(module, make_loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    remove_adapters(module)
    assert same(module.state_dict(), WithMeasuredNorm().state_dict())
