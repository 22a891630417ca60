"""Hazard: several optimizers, toggled by hand, over modules that may hold no adapter (a GAN)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.conftest import WIDTH, make_loader
from tests.hazards.runs import is_adapter_only, lora, trained
from tests.states import adapters_of, base_of, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


class Adversarial(pl.LightningModule):
    """A generator and a discriminator that take turns within each step."""

    def __init__(self, optimizers: str = "all") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kind = optimizers
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            self.critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        one, two = self.optimizers()
        self.toggle_optimizer(one)
        loss = self._score(self.generator(real), 1.0)
        self._step(one, loss)
        self.toggle_optimizer(two)
        loss = self._score(real, 1.0) + self._score(self.generator(real).detach(), 0.0)
        self._step(two, loss)

    def _score(self, x: Tensor, wanted: float) -> Tensor:
        answer = self.critic(x)
        return F.binary_cross_entropy_with_logits(answer, torch.full_like(answer, wanted))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = [list(self.generator.parameters()), list(self.critic.parameters())]
        if self.kind == "filtered":
            parts = [[p for p in part if p.requires_grad] for part in parts]
        return [torch.optim.Adam(part, lr=1e-2) for part in parts]


@pytest.mark.parametrize("kind", ["all", "filtered"])
def test_two_toggled_optimizers_train_all_adapters_and_no_base(make_trainer: Any, kind: str) -> None:
    module = Adversarial(kind)
    before = base_of(module)
    make_trainer(max_epochs=2, callbacks=[lora(target_modules=[r"(generator|critic)\.\d"])]).fit(module, make_loader())
    assert trained(module)
    assert same(base_of(module), before)


def test_two_toggled_optimizers_resume_bitwise_from_adapter_only_files(make_trainer: Any, tmp_path: Path) -> None:
    def run(epochs: int, folder: str, resume: Any = None) -> tuple[Adversarial, str]:
        module, saver = Adversarial(), ModelCheckpoint(dirpath=tmp_path / folder)
        callbacks = [lora(target_modules=[r"(generator|critic)\.\d"]), saver]
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, make_loader(), ckpt_path=resume)
        return module, saver.best_model_path

    whole, _ = run(3, "whole")
    _, first = run(1, "parts")
    resumed, _ = run(3, "parts", first)
    assert is_adapter_only(first)
    assert same(adapters_of(whole), adapters_of(resumed))


def test_a_file_saved_while_an_optimizer_is_toggled_has_all_adapters(make_trainer: Any, tmp_path: Path) -> None:
    class Saving(Adversarial):
        def _score(self, x: Tensor, wanted: float) -> Tensor:
            self.trainer.save_checkpoint(tmp_path / "toggled.ckpt")
            return super()._score(x, wanted)

    module = Saving()
    make_trainer(callbacks=[lora(target_modules=[r"(generator|critic)\.\d"])]).fit(module, make_loader())
    found = torch.load(tmp_path / "toggled.ckpt", weights_only=True)
    assert found["state_dict"].keys() == adapters_of(module).keys()


def test_an_optimizer_over_a_module_without_adapters_explains_the_empty_parameter_list(make_trainer: Any) -> None:
    trainer = make_trainer(callbacks=[lora(target_modules=["generator.0"])])
    with pytest.raises(ValueError, match=r"empty parameter list.*LoRACallback froze the base.*modules_to_save"):
        trainer.fit(Adversarial("filtered"), make_loader())


def test_an_optimizer_left_without_any_parameter_is_warned_of_and_its_loss_explained(make_trainer: Any) -> None:
    trainer = make_trainer(callbacks=[lora(target_modules=["generator.0"])])
    idle = pytest.warns(UserWarning, match=r"optimizer 1 \(Adam\) holds only frozen parameters")
    explained = pytest.raises(RuntimeError, match=r"this loss depends on no adapter.*modules_to_save")
    with idle, explained:
        trainer.fit(Adversarial(), make_loader())


def test_a_critic_that_is_trained_in_full_needs_no_adapters(make_trainer: Any) -> None:
    module = Adversarial()
    start = module.critic[0].weight.detach().clone()
    callback = lora(target_modules=[r"generator\.\d"], modules_to_save=["critic"])
    make_trainer(callbacks=[callback]).fit(module, make_loader())
    assert trained(module)
    assert not torch.equal(module.critic[0].weight, start)


def test_a_loss_that_no_adapter_reaches_is_explained(make_trainer: Any) -> None:
    class TwoLosses(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.used(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(callbacks=[lora(target_modules=["unused"])])
    with pytest.raises(RuntimeError, match=r"does not require grad.*this loss depends on no adapter"):
        trainer.fit(TwoLosses(), make_loader())


def test_alternating_optimizers_warn_of_what_the_first_batch_left_out(make_trainer: Any) -> None:
    class Alternating(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            self.toggle_optimizer(optimizer)
            x = batch[0] if batch_idx % 2 else self.generator(batch[0])
            self._step(optimizer, self._score(x, 1.0))

    module = Alternating()
    trainer = make_trainer(max_epochs=2, callbacks=[lora(target_modules=[r"(generator|critic)\.\d"])])
    with pytest.warns(UserWarning, match="got no gradient from the first training step"):
        trainer.fit(module, make_loader())
    assert trained(module)
