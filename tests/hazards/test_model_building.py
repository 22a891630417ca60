"""Hazard: modules built late, optimizers built early, models that are not in train mode, heads that are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import TargetNotFoundError, UnsupportedSetupError
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import adapters_of, base_of, read, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


class InConfigureModel(TinyModule):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            super().build()


class InSetup(TinyModule):
    def build(self) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "head"):
            super().build()


class HeadInSetup(TinyModule):
    """The backbone is there at once, the head when the data is known."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "second"):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.second = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(super().forward(x))


@pytest.mark.parametrize("cls", [InConfigureModel, InSetup, HeadInSetup])
def test_a_lazily_built_model_trains_adapters_only(make_trainer: Any, tmp_path: Path, cls: Any) -> None:
    module, saver = cls(), ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(), saver])
    fit(trainer, module)
    reference = cls()
    make_trainer().validate(reference, make_loader(), verbose=False)
    assert trained(module)
    assert same(base_of(module), reference.state_dict())
    assert is_adapter_only(saver.best_model_path)
    score = metric(trainer.test(module, make_loader(), verbose=False))
    tester = make_trainer(callbacks=[lora()])
    assert metric(tester.test(cls(), make_loader(), ckpt_path=saver.best_model_path, verbose=False)) == score


def test_a_layer_built_in_setup_is_adapted_beside_those_that_were_there(make_trainer: Any) -> None:
    callback = lora(target_modules=["backbone.0", "second"])
    fit(make_trainer(callbacks=[callback]), HeadInSetup())
    assert [row.name for row in callback.report.layers] == ["backbone.0", "second"]


def test_a_model_without_any_layer_to_adapt_is_refused(make_trainer: Any) -> None:
    class Nothing(TinyModule):
        def build(self) -> None:
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1, keepdim=True) * self.scale

    module = Nothing()
    with pytest.raises(TargetNotFoundError, match=r"has no nn\.Linear"):
        fit(make_trainer(callbacks=[lora()]), module)
    assert module.scale.requires_grad


class Captured(TinyModule):
    """Collects its parameters when it is built."""

    def build(self) -> None:
        super().build()
        self.__dict__["collected"] = list(self.parameters())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.collected, lr=1e-2)


def test_a_parameter_list_captured_in_init_is_refused_by_name_of_the_tensors(make_trainer: Any) -> None:
    with pytest.raises(
        UnsupportedSetupError, match=r"4 trainable parameters are in no optimizer.*backbone\.0\.adapters"
    ):
        fit(make_trainer(callbacks=[lora()]), Captured())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_module_without_an_optimizer_goes_on_as_lightning_lets_it(make_trainer: Any) -> None:
    class Without(TinyModule):
        def configure_optimizers(self) -> None:
            return None

    module = Without()
    fit(make_trainer(callbacks=[lora()]), module)
    assert adapters_of(module)
    assert not trained(module)


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_a_model_in_eval_mode_is_warned_of_by_the_name_of_its_dropout(make_trainer: Any) -> None:
    class InEval(TinyModule):
        def build(self) -> None:
            super().build()
            self.backbone.eval()

    with pytest.warns(UserWarning, match=r"such as 'backbone\.2'.*Call \.train\(\)"):
        fit(make_trainer(callbacks=[lora(dropout=0.5)]), InEval(dropout=0.5))


def test_the_dropout_of_adapters_acts_over_a_base_in_eval_mode(make_trainer: Any) -> None:
    class InEval(TinyModule):
        def build(self) -> None:
            super().build()
            self.backbone.eval()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.modes = [child.training for child in self.backbone.modules()]
            self.adapter_modes = [
                layer.adapters["default"].training for layer in self.backbone if hasattr(layer, "adapters")
            ]

    module = InEval()
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        fit(make_trainer(max_epochs=2, callbacks=[lora(dropout=0.5)]), module)
    assert module.adapter_modes == [True, True]


def test_a_model_in_train_mode_is_not_warned_of(make_trainer: Any) -> None:
    fit(make_trainer(callbacks=[lora(dropout=0.5)]), TinyModule(dropout=0.5))  # warnings are errors here


def test_a_fresh_head_that_stays_frozen_is_named_in_the_report(make_trainer: Any) -> None:
    callback = lora()
    fit(make_trainer(callbacks=[callback]), TinyModule())
    assert callback.report.skipped["head"].startswith("output head")
    assert not [key for key in callback.report.saved if key.startswith("head")]


def test_a_fresh_head_in_modules_to_save_is_trained_saved_and_listed(make_trainer: Any, tmp_path: Path) -> None:
    module, saver, callback = TinyModule(), ModelCheckpoint(dirpath=tmp_path), lora(modules_to_save=["head"])
    start = module.head.weight.detach().clone()
    fit(make_trainer(enable_checkpointing=True, callbacks=[callback, saver]), module)
    assert not torch.equal(module.head.weight, start)
    assert dict(callback.report.saved) == {"head.weight": WIDTH, "head.bias": 1}
    assert torch.equal(read(saver.best_model_path)["state_dict"]["head.weight"], module.head.weight)
