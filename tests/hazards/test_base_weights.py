"""Hazard: a base that moves, is unfrozen, is loaded late, holds a stale gradient, or is another one at load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    AdapterMismatchError,
    BaseMismatchError,
    CheckpointError,
    LoRAConfig,
    UnsupportedSetupError,
    inject_adapters,
    load_from_checkpoint,
    remove_adapters,
)
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, lora, metric, trained
from tests.states import adapters_of, base_of, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


@pytest.fixture
def checkpoint(make_trainer: Any, tmp_path: Path) -> str:
    saver = ModelCheckpoint(dirpath=tmp_path / "saved")
    fit(make_trainer(enable_checkpointing=True, callbacks=[lora(), saver]), TinyModule())
    return saver.best_model_path


class LoadedLate(TinyModule):
    """Loads its pretrained weights in setup(), after a callback's setup."""

    assign = False

    def setup(self, stage: str) -> None:
        if not hasattr(self, "loaded"):
            self.load_state_dict(TinyModule(seed=7).state_dict(), assign=self.assign)
            self.loaded = True


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_base_weights_loaded_in_setup_after_the_injection_are_the_base(
    make_trainer: Any, tmp_path: Path, assign: bool
) -> None:
    module, saver = LoadedLate(), ModelCheckpoint(dirpath=tmp_path)
    module.assign = assign
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(), saver])
    fit(trainer, module)
    assert trained(module)
    assert same(base_of(module), TinyModule(seed=7).state_dict())
    score = metric(trainer.test(module, make_loader(), verbose=False))
    tester = make_trainer(callbacks=[lora()])
    path = saver.best_model_path
    assert metric(tester.test(LoadedLate(), make_loader(), ckpt_path=path, verbose=False)) == score
    assert metric(tester.test(TinyModule(seed=7), make_loader(), ckpt_path=path, verbose=False)) == score


def test_base_weights_of_a_part_can_be_loaded_after_the_injection() -> None:
    module = TinyModule()
    inject_adapters(module, LoRAConfig(rank=2))
    module.backbone.load_state_dict(TinyModule(seed=7).backbone.state_dict())
    assert torch.equal(module.backbone[0].weight, TinyModule(seed=7).backbone[0].weight)


def test_half_an_adapter_in_a_state_dict_is_still_an_error() -> None:
    module = TinyModule()
    inject_adapters(module, LoRAConfig(rank=2))
    state = module.state_dict()
    del state["backbone.0.adapters.default.lora_B"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lora_B"):
        module.load_state_dict(state)


class Unfreezing(TinyModule):
    where = "on_train_start"

    def unfreeze_at(self, here: str) -> None:
        if here == self.where:
            self.unfreeze()

    def on_fit_start(self) -> None:
        self.unfreeze_at("on_fit_start")

    def on_train_start(self) -> None:
        self.unfreeze_at("on_train_start")

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.unfreeze_at("on_train_epoch_start")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.unfreeze_at("configure_optimizers")
        return super().configure_optimizers()


MOMENTS = ["on_fit_start", "on_train_start", "on_train_epoch_start", "configure_optimizers"]


@pytest.mark.parametrize("where", MOMENTS)
def test_a_base_that_the_module_unfreezes_is_refused_by_name(make_trainer: Any, where: str) -> None:
    module = Unfreezing()
    module.where = where
    before = base_of(module)
    trainer = make_trainer(max_epochs=3, callbacks=[lora()])
    with pytest.raises(
        UnsupportedSetupError, match=r"made trainable after the injection, such as 'backbone\.0\.weight'"
    ):
        fit(trainer, module)
    assert same(base_of(module), before)


def test_a_base_that_another_callback_unfreezes_is_refused(make_trainer: Any) -> None:
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.head.requires_grad_(True)

    with pytest.raises(UnsupportedSetupError, match=r"2 parameters .* such as 'head\.weight'"):
        fit(make_trainer(callbacks=[lora(), Unfreeze()]), TinyModule())


def test_a_base_unfrozen_within_an_epoch_is_refused_before_that_epoch_is_saved(
    make_trainer: Any, tmp_path: Path
) -> None:
    class Growing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                pl_module.head.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.head.parameters())})

    callbacks = [Growing(), lora(), ModelCheckpoint(dirpath=tmp_path)]
    with pytest.raises(UnsupportedSetupError, match=r"such as 'head\.weight'"):
        fit(make_trainer(enable_checkpointing=True, callbacks=callbacks), TinyModule())
    assert not list(tmp_path.glob("*.ckpt"))


class KeepingGradients(TinyModule):
    """Never sets a gradient to None or zero."""

    def optimizer_zero_grad(self, *args: Any) -> None: ...


@pytest.mark.parametrize("optimizer", ["all", "groups"])
def test_a_stale_gradient_on_the_base_moves_nothing(make_trainer: Any, optimizer: str) -> None:
    module = KeepingGradients(optimizer=optimizer)
    before = base_of(module)
    module(torch.randn(4, WIDTH)).sum().backward()
    assert module.backbone[0].weight.grad is not None
    fit(make_trainer(callbacks=[lora()]), module)
    assert trained(module)
    assert same(base_of(module), before)
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)


def test_an_injection_drops_the_gradients_of_the_base() -> None:
    module = TinyModule()
    module(torch.randn(4, WIDTH)).sum().backward()
    inject_adapters(module, LoRAConfig(rank=2))
    assert all(p.grad is None for p in module.parameters())


OPTIMIZERS = {
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    "fused AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.1, fused=True),
    "named AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_or_keeps_state_of_the_base_and_all_resume(
    make_trainer: Any, tmp_path: Path, name: str
) -> None:
    class Optimized(TinyModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = self.named_parameters() if name.startswith("named") else self.parameters()
            return OPTIMIZERS[name](parameters)

    def run(epochs: int, folder: str, resume: Any = None) -> tuple[TinyModule, str]:
        module, saver = Optimized(), ModelCheckpoint(dirpath=tmp_path / folder)
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[lora(), saver])
        fit(trainer, module, ckpt_path=resume)
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for key, p in module.named_parameters() if "lora_" in key}
        assert {id(p) for p in trainer.optimizers[0].state} <= held
        return module, saver.best_model_path

    before = base_of(Optimized())
    whole, _ = run(2, "whole")
    assert same(base_of(whole), before)
    _, first = run(1, "parts")
    resumed, _ = run(2, "parts", first)
    assert same(resumed.state_dict(), whole.state_dict())


class Renamed(TinyModule):
    def build(self) -> None:
        super().build()
        self.extra = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Grown(TinyModule):
    def build(self) -> None:
        super().build()
        self.head = nn.Linear(WIDTH, 1, bias=False)


OTHERS = {
    "another seed": (lambda: TinyModule(seed=1), BaseMismatchError, "trained on another base: the values of 6 of 6"),
    "another size": (lambda: TinyModule(width=8), AdapterMismatchError, r"is \(2, 16\) in the file and \(2, 8\) here"),
    "a parameter more": (Renamed, BaseMismatchError, "only in the module: extra"),
    "a parameter less": (Grown, BaseMismatchError, r"only in the file: head\.bias"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_wrong_base_is_refused_at_load(make_trainer: Any, checkpoint: str, kind: str, verb: str) -> None:
    build, error, message = OTHERS[kind]
    module = build()
    before = base_of(module)
    trainer = make_trainer(max_epochs=2, callbacks=[lora()])
    loader = make_loader(width=module.hparams["width"])
    with pytest.raises(error, match=message):
        getattr(trainer, verb)(module, *[loader] * (2 if verb == "fit" else 1), ckpt_path=checkpoint)
    assert same(base_of(module), before)
    assert not trained(module)


def test_a_wrong_base_is_refused_by_load_from_checkpoint_too(checkpoint: str) -> None:
    with pytest.raises(BaseMismatchError, match="Build the module with the weights it had then"):
        load_from_checkpoint(TinyModule, checkpoint, seed=1)


def test_an_edited_base_is_refused_where_the_sample_sees_it(make_trainer: Any, checkpoint: str) -> None:
    module = TinyModule()
    with torch.no_grad():
        module.backbone[0].weight[0, 0] += 1e-6
    with pytest.raises(BaseMismatchError, match=r"1 of 6 parameters differ: backbone\.0\.weight"):
        make_trainer(callbacks=[lora()]).test(module, make_loader(), ckpt_path=checkpoint)


def test_the_right_base_loads_after_a_wrong_one_was_refused(make_trainer: Any, checkpoint: str) -> None:
    trainer = make_trainer(callbacks=[lora()])
    with pytest.raises(BaseMismatchError):
        trainer.test(TinyModule(seed=1), make_loader(), ckpt_path=checkpoint)
    module = TinyModule()
    trainer.test(module, make_loader(), ckpt_path=checkpoint, verbose=False)
    assert trained(module)
    assert adapters_of(module)


class Lengthened(TinyModule):
    """Adds rows at the end of a table, at random and unsaved, as resize_token_embeddings does."""

    def build(self) -> None:
        super().build()
        self.table = nn.Embedding(104, 16)
        with torch.no_grad():
            self.table.weight[:100] = 1.0


def test_rows_added_to_an_embedding_that_differ_at_each_build_are_refused(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[lora()])
    fit(trainer, Lengthened())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(BaseMismatchError, match=r"1 of 7 parameters differ: table\.weight"):
        load_from_checkpoint(Lengthened, tmp_path / "x.ckpt")


class Cell(nn.Module):
    """Counts its calls in training, in what it gives a state dict beside its tensors."""

    count: Any = 0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return x


class Counting(TinyModule):
    """A buffer that moves in the second epoch, and a cell."""

    def build(self) -> None:
        super().build()
        self.backbone.append(Cell())
        self.register_buffer("threshold", torch.zeros(1))

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            self.threshold.fill_(0.7)


class SaveAtFirstEpoch(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("callbacks", [list, lambda: [lora()]], ids=["Lightning", "LoRA"])
def test_a_buffer_that_moved_after_the_save_goes_back_when_the_file_is_loaded(
    make_trainer: Any, tmp_path: Path, callbacks: Any
) -> None:
    module, path = Counting(), tmp_path / "first.ckpt"
    trainer = make_trainer(max_epochs=2, callbacks=[*callbacks(), SaveAtFirstEpoch(path)])
    fit(trainer, module)
    assert module.threshold.item() > 0.5
    trainer.test(module, make_loader(), ckpt_path=path, verbose=False)
    assert module.threshold.item() == 0.0


def test_a_removal_brings_buffers_back_that_the_training_moved(make_trainer: Any) -> None:
    module = Counting()
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), module)
    remove_adapters(module)
    assert module.threshold.item() == 0.0


@pytest.mark.parametrize("callbacks", [list, lambda: [lora()]], ids=["Lightning", "LoRA"])
def test_what_a_module_keeps_as_extra_state_goes_on_after_a_resume(
    make_trainer: Any, tmp_path: Path, callbacks: Any
) -> None:
    trainer = make_trainer(callbacks=callbacks())
    fit(trainer, Counting())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = Counting()
    fit(make_trainer(max_epochs=2, callbacks=callbacks()), module, ckpt_path=tmp_path / "x.ckpt")
    assert module.backbone[-1].count == 4


def test_a_file_that_lacks_an_extra_state_is_refused(make_trainer: Any, checkpoint: str) -> None:
    class WithCell(TinyModule):
        def build(self) -> None:
            super().build()
            self.backbone.append(Cell())

    with pytest.raises(AdapterMismatchError, match=r"missing from the file: backbone\.4\._extra_state"):
        load_from_checkpoint(WithCell, checkpoint)


def test_an_extra_state_that_no_file_can_hold_safely_is_refused_at_the_save(make_trainer: Any, tmp_path: Path) -> None:
    module = Counting()
    trainer = make_trainer(callbacks=[lora()])
    fit(trainer, module)
    module.backbone[-1].count = object()
    with pytest.raises(CheckpointError, match=r"'backbone\.4\._extra_state' is of type dict.*get_extra_state"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")


def test_a_head_trained_in_full_may_have_an_extra_state(make_trainer: Any) -> None:
    class WithHead(TinyModule):
        def build(self) -> None:
            super().build()
            self.head = nn.Sequential(self.head, Cell())

    module = WithHead()
    fit(make_trainer(callbacks=[lora(modules_to_save=["head"])]), module)
    remove_adapters(module)
    assert same(tensors(module), tensors(WithHead()))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


class NewHead(TinyModule):
    """Gets its head, of the size of the data, in setup()."""

    outputs = 1

    def setup(self, stage: str) -> None:
        if not hasattr(self, "fresh"):
            self.head = nn.Linear(WIDTH, self.outputs)
            self.fresh = self.head.weight.detach().clone()


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_head_built_in_setup_gets_back_the_values_that_it_was_built_with(make_trainer: Any, outputs: int) -> None:
    module = NewHead()
    module.outputs = outputs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        fit(make_trainer(callbacks=[lora(target_modules="backbone.*", modules_to_save=["head"])]), module)
    assert not torch.equal(module.head.weight, module.fresh)
    remove_adapters(module)
    assert torch.equal(module.head.weight, module.fresh)
    assert type(module.backbone[0]) is nn.Linear


def test_a_removal_keeps_the_hook_that_a_user_put_on_the_module(make_trainer: Any, tmp_path: Path) -> None:
    def hook(checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    module = TinyModule()
    module.on_save_checkpoint = hook  # type: ignore[method-assign]
    trainer = make_trainer(callbacks=[lora()])
    fit(trainer, module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["mine"] == 1
    remove_adapters(module)
    assert module.__dict__["on_save_checkpoint"] is hook
    assert "on_load_checkpoint" not in module.__dict__
