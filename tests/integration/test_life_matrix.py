"""The life of a run, for each place where a network is built and each way to hand its parameters to an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_lora import UnsupportedSetupError
from tests.integration.lives import ADAPTERS, LIGHTNINGS_ADVICE, best_and_last, lora, quiet_trainer, silence
from tests.integration.networks import BUILDS, STEPS_PER_EPOCH, Regression, loader, vanilla_state
from tests.integration.process import in_new_process
from tests.states import adapters_of, base_of, read, same

OPTIMIZERS = ("all", "filtered", "groups")
pytestmark = LIGHTNINGS_ADVICE
CELLS = list(itertools.product(BUILDS, OPTIMIZERS))


@dataclass
class Life:
    """A run of two epochs: good in the first, ruined in the second."""

    build: str
    optimizer: str
    folder: Path
    module: Regression
    trainer: pl.Trainer
    best_loss: float  # as validation logged it in the first epoch
    last_loss: float
    initial: dict[str, Tensor]

    def fresh(self, **options: Any) -> Regression:
        return BUILDS[self.build](optimizer=self.optimizer, **options)

    @property
    def first(self) -> Path:
        return self.folder / "epoch=0.ckpt"


class Losses(pl.Callback):
    """Keeps what validation logged, and the adapters as they were at the start."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.initial: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.initial = adapters_of(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values.append(trainer.callback_metrics["val_loss"].item())


class Steps(pl.Callback):
    """Notes the steps that a fit takes, and the adapters that it starts from."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.adapters: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.adapters = adapters_of(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(trainer.global_step)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Life]:
    """Each life is lived once, when a test first asks for it."""
    known: dict[tuple[str, str], Life] = {}

    def live(build: str, optimizer: str) -> Life:
        if (build, optimizer) not in known:
            folder = tmp_path_factory.mktemp(f"{build}-{optimizer}")
            module, losses = BUILDS[build](optimizer=optimizer), Losses()
            trainer = quiet_trainer(folder, lora(), losses, best_and_last(folder))
            trainer.fit(module, loader(), loader())
            best, last = losses.values
            known[build, optimizer] = Life(build, optimizer, folder, module, trainer, best, last, losses.initial)
        return known[build, optimizer]

    return live


@pytest.fixture(params=CELLS, ids="-".join)
def life(request: pytest.FixtureRequest, lives: Callable[[str, str], Life]) -> Life:
    return lives(*request.param)


def test_fit_moves_every_adapter_and_not_a_bit_of_the_base(life: Life) -> None:
    after = adapters_of(life.module)
    assert set(after) == ADAPTERS
    assert all(not torch.equal(after[key], life.initial[key]) for key in ADAPTERS)
    assert same(base_of(life.module), vanilla_state())
    assert life.trainer.global_step == 2 * STEPS_PER_EPOCH
    assert life.last_loss > 1.5 * life.best_loss


def test_a_fit_saves_exactly_what_it_trained(life: Life) -> None:
    for name, epoch in (("epoch=0.ckpt", 1), ("epoch=1.ckpt", 2), ("last.ckpt", 2)):
        saved = read(life.folder / name)
        assert set(saved["state_dict"]) == ADAPTERS
        assert saved["global_step"] == epoch * STEPS_PER_EPOCH
        assert sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]) == len(ADAPTERS)
    assert same(read(life.folder / "last.ckpt")["state_dict"], adapters_of(life.module))


def test_a_resumed_fit_ends_where_the_whole_one_did(life: Life, tmp_path: Path) -> None:
    module, losses = life.fresh(), Losses()
    trainer = quiet_trainer(tmp_path, lora(), losses)
    trainer.fit(module, loader(), loader(), ckpt_path=life.first)
    assert trainer.global_step == 2 * STEPS_PER_EPOCH
    assert losses.values == [life.last_loss]
    assert same(adapters_of(module), adapters_of(life.module))
    assert same(base_of(module), vanilla_state())


def test_test_best_gives_the_loss_of_the_best_epoch_and_not_of_the_last(life: Life) -> None:
    last = adapters_of(life.module)
    assert life.trainer.checkpoint_callback.best_model_path == str(life.first)
    try:
        assert life.trainer.test(dataloaders=loader(), ckpt_path="best", verbose=False) == [
            {"test_loss": life.best_loss}
        ]
    finally:
        life.module.load_state_dict({**life.module.state_dict(), **last})
    assert life.trainer.test(life.module, loader(), verbose=False) == [{"test_loss": life.last_loss}]


def test_a_fresh_module_and_trainer_get_the_same_losses_from_the_file(life: Life, tmp_path: Path) -> None:
    module = life.fresh()
    trainer = quiet_trainer(tmp_path, lora())
    assert trainer.test(module, loader(), ckpt_path=life.first, verbose=False) == [{"test_loss": life.best_loss}]
    assert trainer.validate(module, loader(), ckpt_path=life.first, verbose=False) == [{"val_loss": life.best_loss}]
    assert trainer.test(module, loader(), ckpt_path=life.folder / "last.ckpt", verbose=False) == [
        {"test_loss": life.last_loss}
    ]


def continue_elsewhere(cells: list[tuple[str, str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Resume and test from the first epoch's checkpoint; runs in a new process."""
    silence()
    results = {}
    for build, optimizer, folder in cells:
        first = Path(folder) / "epoch=0.ckpt"
        module, losses = BUILDS[build](optimizer=optimizer), Losses()
        trainer = quiet_trainer(Path(folder), lora(), losses)
        tested = trainer.test(module, loader(), ckpt_path=first, verbose=False)
        module = BUILDS[build](optimizer=optimizer)
        trainer.fit(module, loader(), loader(), ckpt_path=first)
        results[build, optimizer] = {
            "tested": tested[0]["test_loss"],
            "losses": losses.values[-1:],
            "step": trainer.global_step,
            "adapters": adapters_of(module),
            "base": base_of(module),
        }
    return results


@pytest.fixture(scope="module")
def elsewhere(lives: Callable[[str, str], Life]) -> dict[tuple[str, str], dict[str, Any]]:
    result: dict[tuple[str, str], dict[str, Any]] = in_new_process(
        continue_elsewhere, [(*cell, str(lives(*cell).folder)) for cell in CELLS]
    )
    return result


def test_a_new_process_tests_and_resumes_the_same(life: Life, elsewhere: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = elsewhere[life.build, life.optimizer]
    assert found["tested"] == life.best_loss
    assert found["losses"] == [life.last_loss]
    assert found["step"] == 2 * STEPS_PER_EPOCH
    assert same(found["adapters"], adapters_of(life.module))
    assert same(found["base"], vanilla_state())


def test_a_weights_only_checkpoint_holds_the_adapters_alone_and_tests_the_same(life: Life, tmp_path: Path) -> None:
    module = life.fresh()
    keeper = best_and_last(tmp_path, save_weights_only=True)
    trainer = quiet_trainer(tmp_path, lora(), keeper)
    trainer.fit(module, loader(), loader())
    saved = read(keeper.best_model_path)
    assert set(saved["state_dict"]) == ADAPTERS
    assert "optimizer_states" not in saved
    assert saved["global_step"] == STEPS_PER_EPOCH
    assert same(saved["state_dict"], read(life.first)["state_dict"])
    assert trainer.test(dataloaders=loader(), ckpt_path="best", verbose=False) == [{"test_loss": life.best_loss}]
    other = quiet_trainer(tmp_path, lora())
    assert other.test(life.fresh(), loader(), ckpt_path=keeper.best_model_path, verbose=False) == [
        {"test_loss": life.best_loss}
    ]


def test_a_checkpoint_saved_on_an_exception_holds_the_adapters_of_that_moment(life: Life, tmp_path: Path) -> None:
    failing_step = STEPS_PER_EPOCH + 2
    module = life.fresh(fail_at=failing_step)
    trainer = quiet_trainer(tmp_path, lora(), OnExceptionCheckpoint(tmp_path), ModelCheckpoint(save_on_exception=True))
    with pytest.raises(ZeroDivisionError, match="the training went wrong"):
        trainer.fit(module, loader(), loader())
    saved = read(tmp_path / "on_exception.ckpt")
    assert set(saved["state_dict"]) == ADAPTERS
    assert saved["global_step"] == failing_step
    assert same(saved["state_dict"], adapters_of(module))
    assert same(base_of(module), vanilla_state())
    assert not {"configure_model", "load_checkpoint"} & {*vars(module), *vars(trainer.strategy)}
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert set(read(path)["state_dict"]) == ADAPTERS

    # The same script once more: Lightning takes the file up by itself.
    steps = Steps()
    resumed = quiet_trainer(tmp_path, lora(), steps, OnExceptionCheckpoint(tmp_path))
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        resumed.fit(life.fresh(), loader(), loader())
    assert steps.seen == list(range(failing_step, 2 * STEPS_PER_EPOCH))
    assert same(steps.adapters, saved["state_dict"])


@pytest.mark.parametrize("build", BUILDS)
class TestParametersCapturedBeforeTheAdaptersExist:
    """The optimizer holds the base's parameters only: nothing would train."""

    @pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
    def test_fit_refuses_and_saves_nothing(self, build: str, weights_only: bool, tmp_path: Path) -> None:
        module = BUILDS[build](optimizer="captured")
        keeper = best_and_last(tmp_path / "files", save_weights_only=weights_only)
        trainer = quiet_trainer(tmp_path, lora(), keeper)
        with pytest.raises(UnsupportedSetupError, match=r"in no optimizer.*lora_A.*configure_optimizers"):
            trainer.fit(module, loader(), loader())
        assert not list(tmp_path.rglob("*.ckpt"))
        assert same(base_of(module), vanilla_state())

    def test_the_checkpoint_of_the_exception_is_adapter_only(self, build: str, tmp_path: Path) -> None:
        trainer = quiet_trainer(tmp_path, lora(), OnExceptionCheckpoint(tmp_path))
        with pytest.raises(UnsupportedSetupError, match="in no optimizer"):
            trainer.fit(BUILDS[build](optimizer="captured"), loader(), loader())
        assert set(read(tmp_path / "on_exception.ckpt")["state_dict"]) == ADAPTERS

    def test_resume_refuses_too(self, build: str, lives: Callable[[str, str], Life], tmp_path: Path) -> None:
        life = lives(build, "all")
        with pytest.raises(UnsupportedSetupError, match="in no optimizer"):
            quiet_trainer(tmp_path, lora()).fit(
                BUILDS[build](optimizer="captured"), loader(), loader(), ckpt_path=life.first
            )

    def test_testing_needs_no_optimizer_and_works(
        self, build: str, lives: Callable[[str, str], Life], tmp_path: Path
    ) -> None:
        life = lives(build, "all")
        module = BUILDS[build](optimizer="captured")
        tested = quiet_trainer(tmp_path, lora()).test(module, loader(), ckpt_path=life.first, verbose=False)
        assert tested == [{"test_loss": life.best_loss}]
