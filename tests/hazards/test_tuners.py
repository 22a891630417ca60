"""Hazard: tuners run parts of a fit, save and restore behind the user's back, and come before every other callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import is_adapter_only, lora, trained
from tests.states import adapters_of, base_of, same

pytestmark = [
    # Lightning's own advice to whoever uses its tuners.
    pytest.mark.filterwarnings("ignore:Field `model.batch_size` and `model.hparams.batch_size` are mutually exclusive"),
]


class Tunable(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader(rows=32, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return make_loader()


class Remembering(TorchCheckpointIO):
    """Plain file IO that looks into each file as it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter_only: list[bool] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.adapter_only.append(is_adapter_only(path))


def finder() -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=15, early_stop_threshold=None)


@pytest.mark.parametrize("before", [True, False], ids=["listed before us", "listed after us"])
def test_learning_rate_finder_changes_the_rate_and_nothing_else(make_trainer: Any, before: bool) -> None:
    module, files = Tunable(), Remembering()
    frozen = base_of(module)
    callbacks = [finder(), lora()] if before else [lora(), finder()]
    make_trainer(max_epochs=2, callbacks=callbacks, plugins=[files]).fit(module)
    reference = Tunable()
    reference.lr = module.lr
    make_trainer(max_epochs=2, callbacks=[lora()]).fit(reference)
    assert module.lr != 1e-2
    assert trained(module)
    assert same(adapters_of(module), adapters_of(reference))
    assert same(base_of(module), frozen)
    assert files.adapter_only == [True]


def test_learning_rate_finder_and_then_a_resume(make_trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path)
    make_trainer(enable_checkpointing=True, callbacks=[finder(), lora(), saver]).fit(Tunable())
    module = Tunable()
    trainer = make_trainer(max_epochs=2, callbacks=[lora()])
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(module, ckpt_path=saver.best_model_path)
    assert trainer.global_step == 2 * len(module.train_dataloader())
    assert trained(module)


@pytest.mark.parametrize("before", [True, False], ids=["listed before us", "listed after us"])
def test_batch_size_finder_grows_the_batch_and_nothing_else(make_trainer: Any, before: bool) -> None:
    module, files = Tunable(), Remembering()
    scaler = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    callbacks = [scaler, lora()] if before else [lora(), scaler]
    make_trainer(max_epochs=2, callbacks=callbacks, plugins=[files]).fit(module)
    assert module.batch_size == 4
    reference = Tunable()
    reference.batch_size = 4
    make_trainer(max_epochs=2, callbacks=[lora()]).fit(reference)
    assert same(adapters_of(module), adapters_of(reference))
    assert files.adapter_only == [True]


def test_tuner_lr_find_leaves_fresh_adapters_and_a_module_that_fits(make_trainer: Any) -> None:
    module = Tunable()
    trainer = make_trainer(callbacks=[lora()])
    found = Tuner(trainer).lr_find(module, num_training=15, early_stop_threshold=None)
    assert found is not None
    assert not trained(module)
    trainer.fit(module)
    reference = Tunable()
    reference.lr = module.lr
    make_trainer(callbacks=[lora()]).fit(reference)
    assert same(adapters_of(module), adapters_of(reference))


def test_tuner_scale_batch_size_leaves_fresh_adapters_and_a_module_that_fits(make_trainer: Any) -> None:
    module = Tunable()
    trainer = make_trainer(callbacks=[lora()])
    assert Tuner(trainer).scale_batch_size(module, steps_per_trial=1, max_trials=2) == 4
    assert not trained(module)
    trainer.fit(module)
    assert trained(module)


def test_tuners_do_not_merge(make_trainer: Any) -> None:
    module, callback = Tunable(), lora(merge=True)
    trainer = make_trainer(callbacks=[callback])
    Tuner(trainer).lr_find(module, num_training=15, early_stop_threshold=None)
    assert callback.merge_report is None
    trainer.fit(module)
    assert callback.merge_report is not None
