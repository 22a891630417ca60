"""Hazard: Ctrl-C and exceptions, after which Lightning calls neither on_fit_end nor teardown."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_lora.patches import is_patched
from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import base_of, read, same


class Interrupted(TinyModule):
    """Stops in its third training step, once."""

    def __init__(self, error: type[BaseException] = KeyboardInterrupt, where: str = "training_step") -> None:
        super().__init__()
        self.hparams.clear()
        self.hparams.update(width=16, dropout=0.0, optimizer="all", seed=0)
        self.error, self.where, self.calls = error, where, 0

    def build(self) -> None:
        self.hparams.update(width=16, dropout=0.0, optimizer="all", seed=0)
        super().build()

    def stop(self, here: str) -> None:
        if here == self.where:
            self.calls += 1
            if self.calls == 3:
                raise self.error("stop")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.stop("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.stop("validation_step")
        super().validation_step(batch, batch_idx)


# Lightning's words to whoever lists OnExceptionCheckpoint: it looks for a file to go on from.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`\.fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings(r"ignore:\.fit\(ckpt_path=.last.\) is set, but there is no last checkpoint"),
]


@pytest.fixture(autouse=True)
def _keep_signal_handlers() -> Iterator[None]:
    # Lightning ignores SIGINT for the rest of the process once it has seen Ctrl-C.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupt(trainer: Any, module: Interrupted) -> None:
    expected = SystemExit if module.error is KeyboardInterrupt else module.error
    with pytest.raises(expected):
        fit(trainer, module)


ERRORS = [KeyboardInterrupt, RuntimeError, MemoryError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_after_an_interruption_nothing_of_the_run_is_left_on_the_module(
    make_trainer: Any, error: Any, where: str
) -> None:
    module, callback = Interrupted(error, where), lora(merge=True)
    frozen = base_of(module)
    trainer = make_trainer(max_epochs=4, callbacks=[callback])
    interrupt(trainer, module)
    assert "configure_model" not in vars(module)
    assert "load_checkpoint" not in vars(trainer.strategy)
    assert not any(child._forward_pre_hooks for child in module.modules())
    assert same(base_of(module), frozen)
    assert callback.merge_report is None


@pytest.mark.parametrize("error", ERRORS)
def test_after_an_interruption_the_same_objects_fit_again(make_trainer: Any, error: Any) -> None:
    module, callback = Interrupted(error), lora()
    interrupt(make_trainer(max_epochs=2, callbacks=[callback]), module)
    trainer = make_trainer(max_epochs=2, callbacks=[callback])
    fit(trainer, module)
    assert trainer.global_step == 4
    assert trained(module)


def test_an_error_in_configure_optimizers_leaves_a_module_that_fits(make_trainer: Any) -> None:
    class Broken(TinyModule):
        def configure_optimizers(self) -> Any:
            if not hasattr(self, "repaired"):
                raise ValueError("no optimizer today")
            return super().configure_optimizers()

    module = Broken()
    with pytest.raises(ValueError, match="no optimizer today"):
        fit(make_trainer(callbacks=[lora()]), module)
    assert "configure_model" not in vars(module)
    module.repaired = True
    fit(make_trainer(callbacks=[lora()]), module)
    assert trained(module)


@pytest.mark.parametrize("error", ERRORS)
def test_on_exception_checkpoint_holds_adapters_only_and_continues(
    make_trainer: Any, tmp_path: Path, error: Any
) -> None:
    saver = OnExceptionCheckpoint(tmp_path)
    interrupt(make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[lora(), saver]), Interrupted(error))
    path = tmp_path / "on_exception.ckpt"
    assert is_adapter_only(path)
    assert read(path)["global_step"] == 2
    module = TinyModule()
    again = OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[lora(), again])
    fit(trainer, module, ckpt_path=path)
    assert trainer.global_step == 4
    whole = TinyModule()
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), whole)
    assert same(module.state_dict(), whole.state_dict())


@pytest.mark.parametrize("error", ERRORS)
def test_model_checkpoint_saving_on_exception_holds_adapters_only(
    make_trainer: Any, tmp_path: Path, error: Any
) -> None:
    try:
        saver = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True)
    except TypeError:
        pytest.skip("save_on_exception comes with lightning 2.5.6")
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[lora(), saver])
    interrupt(trainer, Interrupted(error))
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    assert all(map(is_adapter_only, files))


def test_an_interrupted_run_can_still_be_saved_by_hand(make_trainer: Any, tmp_path: Path) -> None:
    module = Interrupted()
    trainer = make_trainer(max_epochs=2, callbacks=[lora()])
    interrupt(trainer, module)
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert is_adapter_only(tmp_path / "by_hand.ckpt")


def test_an_interrupted_run_can_be_validated(make_trainer: Any) -> None:
    module = Interrupted()
    interrupt(make_trainer(max_epochs=2, callbacks=[lora()]), module)
    trainer = make_trainer(callbacks=[lora()])
    values = [metric(trainer.validate(module, make_loader(), verbose=False)) for _ in range(2)]
    assert values[0] == values[1]


def test_a_patch_is_gone_after_an_exception_in_setup(make_trainer: Any) -> None:
    class Broken(TinyModule):
        def setup(self, stage: str) -> None:
            raise OSError("no data")

    module = Broken()
    trainer = make_trainer(callbacks=[lora()])
    with pytest.raises(OSError, match="no data"):
        fit(trainer, module)
    from lightning_lora.hooks import _configure_model

    assert not is_patched(module, "configure_model", _configure_model)
