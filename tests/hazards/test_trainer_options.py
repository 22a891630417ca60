"""Hazard: Trainer options and everyday callbacks that change when steps, saves and hooks happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
)
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, MergeConfig, UnsupportedSetupError
from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, trained
from tests.states import adapters_of, base_of, same


def test_gradient_accumulation_steps_as_one_large_batch_does(make_trainer: Any) -> None:
    accumulated, large = TinyModule(), TinyModule()
    make_trainer(callbacks=[lora()], accumulate_grad_batches=2).fit(accumulated, make_loader(), make_loader())
    loader = make_loader(batch_size=16)
    make_trainer(callbacks=[lora()]).fit(large, loader, loader)
    for key, value in adapters_of(accumulated).items():
        torch.testing.assert_close(value, adapters_of(large)[key])


def test_gradient_accumulation_scheduler_works_and_resumes(make_trainer: Any, tmp_path: Path) -> None:
    def run(epochs: int, folder: str, resume: Any = None) -> tuple[TinyModule, str]:
        module = TinyModule()
        saver = ModelCheckpoint(dirpath=tmp_path / folder)
        scheduler = GradientAccumulationScheduler({0: 2, 1: 1})
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[scheduler, lora(), saver])
        fit(trainer, module, ckpt_path=resume)
        return module, saver.best_model_path

    whole, _ = run(3, "whole")
    _, first = run(1, "parts")
    resumed, _ = run(3, "parts", first)
    assert same(whole.state_dict(), resumed.state_dict())


def test_early_stopping_stops_and_the_best_checkpoint_loads(make_trainer: Any, tmp_path: Path) -> None:
    module, saver = TinyModule(), ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    stopper = EarlyStopping("val_loss", min_delta=1e9, patience=1)
    trainer = make_trainer(max_epochs=9, enable_checkpointing=True, callbacks=[stopper, lora(), saver])
    fit(trainer, module)
    assert trainer.current_epoch == 2
    assert is_adapter_only(saver.best_model_path)
    trainer.test(module, make_loader(), ckpt_path="best", verbose=False)


def test_fast_dev_run_goes_through_the_whole_life(make_trainer: Any, tmp_path: Path) -> None:
    module, callback = TinyModule(), lora(merge=MergeConfig(output_dir=str(tmp_path / "merged")))
    make_trainer(fast_dev_run=True, callbacks=[callback]).fit(module, make_loader(), make_loader())
    assert callback.merge_report is not None
    assert type(module.head) is nn.Linear


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")
@pytest.mark.filterwarnings("ignore:`Trainer\\(barebones=True\\)`")
def test_a_barebones_trainer_trains(capsys: Any) -> None:
    module = TinyModule()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, barebones=True, callbacks=[LoRACallback(LoRAConfig(rank=2))]
    )
    fit(trainer, module)
    assert trained(module)
    assert "layers adapted" not in capsys.readouterr().out


def test_no_epoch_at_all_leaves_adapters_at_their_start(make_trainer: Any) -> None:
    module = TinyModule()
    reference = base_of(module)
    fit(make_trainer(max_epochs=0, callbacks=[lora()]), module)
    assert adapters_of(module)
    assert not trained(module)
    assert same(base_of(module), reference)


def test_a_callback_that_the_module_configures_itself_works(make_trainer: Any, tmp_path: Path) -> None:
    class SelfAdapting(TinyModule):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [lora(), ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)]

    module = SelfAdapting()
    trainer = make_trainer(enable_checkpointing=True)
    fit(trainer, module)
    assert trained(module)
    assert is_adapter_only(trainer.checkpoint_callback.best_model_path)
    fit(make_trainer(enable_checkpointing=True), module)
    assert is_adapter_only(trainer.checkpoint_callback.best_model_path)


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_may_come_before_or_after(make_trainer: Any, first: bool) -> None:
    class Recording(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            self.moved = trained(pl_module)

    recording = Recording()
    callbacks = [lora(), recording] if first else [recording, lora()]
    fit(make_trainer(callbacks=callbacks), TinyModule())
    assert recording.moved


def test_two_lora_callbacks_are_refused(make_trainer: Any) -> None:
    trainer = make_trainer(callbacks=[lora(), lora(rank=4)])
    with pytest.raises(UnsupportedSetupError, match="more than one LoRACallback"):
        fit(trainer, TinyModule())


@pytest.mark.parametrize("subclass_first", [True, False])
def test_a_lora_callback_and_one_of_a_subclass_are_refused(make_trainer: Any, subclass_first: bool) -> None:
    class Mine(LoRACallback):
        pass

    callbacks = [lora(), Mine(LoRAConfig(rank=4))]
    trainer = make_trainer(callbacks=callbacks[::-1] if subclass_first else callbacks)
    with pytest.raises(UnsupportedSetupError, match="more than one"):
        fit(trainer, TinyModule())


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


@pytest.mark.parametrize("other", [Thaw, BackboneFinetuning])
@pytest.mark.parametrize("before", [True, False])
def test_finetuning_callbacks_are_refused(make_trainer: Any, other: Any, before: bool) -> None:
    callbacks = [other(), lora()] if before else [lora(), other()]
    trainer = make_trainer(callbacks=callbacks)
    with pytest.raises(UnsupportedSetupError, match="freezes and unfreezes the base"):
        fit(trainer, TinyModule())


@pytest.mark.parametrize("before", [True, False])
def test_pruning_callbacks_are_refused(make_trainer: Any, before: bool) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    trainer = make_trainer(callbacks=[pruning, lora()] if before else [lora(), pruning])
    with pytest.raises(UnsupportedSetupError, match="ModelPruning prunes the weights of the base"):
        fit(trainer, TinyModule())


def test_a_refused_run_leaves_the_module_usable(make_trainer: Any) -> None:
    module = TinyModule()
    with pytest.raises(UnsupportedSetupError):
        fit(make_trainer(callbacks=[lora(), lora()]), module)
    fit(make_trainer(callbacks=[lora()]), module)
    assert trained(module)


def test_the_same_callback_listed_twice_is_one_callback(make_trainer: Any) -> None:
    callback, module, once = lora(), TinyModule(), TinyModule()
    fit(make_trainer(max_epochs=2, callbacks=[callback, callback]), module)
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), once)
    assert same(module.state_dict(), once.state_dict())


def test_the_summary_of_lightning_counts_what_the_report_counts(make_trainer: Any) -> None:
    class Reading(ModelSummary):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            found.append(self._summary(trainer, pl_module))

    found: list[Any] = []
    callback = lora()
    fit(make_trainer(enable_model_summary=True, callbacks=[Reading(), callback]), TinyModule())
    assert found[0].trainable_parameters == callback.report.trainable_parameters
    assert found[0].total_parameters == callback.report.total_parameters


def test_a_file_saved_for_a_requeued_job_is_adapter_only(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[lora()])
    fit(trainer, TinyModule())
    trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(str(tmp_path)))
    assert is_adapter_only(tmp_path / "hpc_ckpt_1.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_hooks_of_the_module_for_saving_and_loading_are_called_with_what_they_expect(
    make_trainer: Any, tmp_path: Path
) -> None:
    class Hooked(TinyModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["vocabulary"] = ["a", "b"]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.vocabulary, self.keys = checkpoint["vocabulary"], set(checkpoint["state_dict"])

    saver = ModelCheckpoint(dirpath=tmp_path)
    fit(make_trainer(enable_checkpointing=True, callbacks=[lora(), saver]), Hooked())
    assert is_adapter_only(saver.best_model_path)
    module = Hooked()
    tester = make_trainer(callbacks=[lora()])
    tester.test(module, make_loader(), ckpt_path=saver.best_model_path, verbose=False)
    assert module.vocabulary == ["a", "b"]
    assert module.keys == set(module.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_module_that_filters_its_own_state_dict_keeps_its_adapters(make_trainer: Any, tmp_path: Path) -> None:
    class Filtering(TinyModule):
        """Leaves a part that it loads from elsewhere out of its files."""

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            state = super().state_dict(*args, **kwargs)
            return {key: value for key, value in state.items() if not key.startswith("head.")}

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    saver = ModelCheckpoint(dirpath=tmp_path)
    whole, part = Filtering(), Filtering()
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), whole)
    fit(make_trainer(enable_checkpointing=True, callbacks=[lora(), saver]), Filtering())
    assert is_adapter_only(saver.best_model_path)
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), part, ckpt_path=saver.best_model_path)
    assert same(adapters_of(part), adapters_of(whole))
