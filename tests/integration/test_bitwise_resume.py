"""A stopped and resumed run equals one that never stopped, bit by bit: adapters, optimizer, every logged value.

Exact at the end of an epoch with any data loader, and within an epoch with a loader that can resume (``state_dict``).
Not exact, because of what Lightning does: within an epoch with a plain DataLoader, whose data it starts anew (and
warns); after an exception in the middle of a step; and with reload_dataloaders_every_n_epochs, where a resumed run asks
for its loaders at other times.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from lightning_lora import CheckpointError
from tests.integration.lives import LIGHTNINGS_ADVICE, Recorder, best_and_last, lora, quiet_trainer, silence
from tests.integration.networks import ROWS, STEPS_PER_EPOCH, Eager, loader, rows
from tests.integration.process import in_new_process
from tests.states import adapters_of, base_of, read, same

pytestmark = LIGHTNINGS_ADVICE


class Noisy(Eager):
    """Draws from every random stream in a training step."""

    scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.scale * self.loss(batch) * (1.0 + 0.1 * random.random()) * (1.0 + 0.1 * np.random.rand())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(configured["optimizer"], T_max=8)
        return {"optimizer": configured["optimizer"], "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class NoisyEpochs(Noisy):
    """Draws at the start of an epoch, too; within an epoch and after its last step, Lightning skips that hook."""

    def on_train_epoch_start(self) -> None:
        self.scale = 1.0 + 0.1 * torch.rand(()).item() + 0.1 * random.random() + 0.1 * np.random.rand()


class EpochShuffle(Sampler[int]):
    """Another order every epoch, seeded by its number."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __len__(self) -> int:
        return ROWS


def shuffled(kind: str) -> DataLoader[Any]:
    if kind == "seeded by epoch":
        return loader(sampler=EpochShuffle())
    if kind == "own generator":
        return loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    if kind == "generator of the sampler":
        return loader(sampler=RandomSampler(rows(), generator=torch.Generator().manual_seed(3)))
    return loader(shuffle=True)


@dataclass(frozen=True)
class Case:
    """What a run is made of, and when it saves."""

    precision: str = "32-true"
    algorithm: str = "adamw"
    shuffle: str = "global stream"
    save: str = "epoch end"

    def __str__(self) -> str:
        return "-".join(asdict(self).values()).replace(" ", "_")


SAVES: dict[str, dict[str, Any]] = {
    "epoch end": {},
    "validation end": {"save_on_train_epoch_end": False},
    "last step of the epoch": {"every_n_train_steps": STEPS_PER_EPOCH, "monitor": None},
}


def run(case: Case, folder: Path, *, epochs: int, seed: int, resume: Path | None = None) -> dict[str, Any]:
    """Fit, and return everything that has to be equal."""
    with isolate_rng():
        pl.seed_everything(seed, verbose=False)
        kind = Noisy if case.save == "last step of the epoch" else NoisyEpochs
        module = kind(algorithm=case.algorithm, dropout=0.3, ruin=1.0)
        recorder = Recorder()
        keeper = best_and_last(folder, filename="{step}", **SAVES[case.save])
        trainer = quiet_trainer(
            folder, lora(dropout=0.3), keeper, epochs=epochs, logger=recorder, precision=case.precision
        )
        trainer.fit(module, shuffled(case.shuffle), loader(), ckpt_path=resume)
        return {
            "step": trainer.global_step,
            "adapters": adapters_of(module),
            "base": base_of(module),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "logged": recorder.rows,
        }


def continue_elsewhere(halves: list[tuple[Case, str]]) -> list[dict[str, Any]]:
    """The second epochs; runs in a new process, with other random streams at its start."""
    silence()
    return [run(case, Path(folder), epochs=2, seed=99, resume=half_way(Path(folder))) for case, folder in halves]


def half_way(folder: Path) -> Path:
    return folder / f"step={STEPS_PER_EPOCH}.ckpt"


def second_epoch(logged: list[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    """What a run logs of its second epoch; the size of a file depends on the names of folders in it."""
    return [row for row in logged if row[0] >= STEPS_PER_EPOCH and row[1] != "lora/checkpoint_bytes"]


CASES = [
    *itertools.starmap(Case, itertools.product(("32-true", "bf16-true", "bf16-mixed"), ("adamw", "sgd"))),
    Case(shuffle="seeded by epoch"),
    Case(shuffle="own generator"),
    Case(shuffle="generator of the sampler"),
    Case(save="validation end"),
    Case(save="last step of the epoch"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[dict[str, Any], dict[str, Any]]]:
    """For each case: two epochs in one go, and one epoch with the second in a new process."""
    whole, halves = [], []
    for case in CASES:
        whole.append(run(case, tmp_path_factory.mktemp("whole"), epochs=2, seed=7))
        folder = tmp_path_factory.mktemp("half")
        run(case, folder, epochs=1, seed=7)
        halves.append((case, str(folder)))
    resumed = in_new_process(continue_elsewhere, halves)
    return dict(zip(CASES, zip(whole, resumed, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_epochs_in_one_go_equal_one_and_a_resume_in_a_new_process(
    case: Case, pairs: dict[Case, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    whole, resumed = pairs[case]
    assert resumed["step"] == 2 * STEPS_PER_EPOCH
    assert second_epoch(resumed["logged"]) == second_epoch(whole["logged"])
    assert len([row for row in second_epoch(whole["logged"]) if row[1] == "train_loss_step"]) == STEPS_PER_EPOCH
    for part in ("adapters", "optimizer", "scheduler", "base"):
        assert same(resumed[part], whole[part]), part


@pytest.mark.parametrize("shuffle", ["seeded by epoch", "global stream", "own generator"])
def test_without_the_saved_random_state_the_losses_differ(shuffle: str, tmp_path: Path) -> None:
    case = Case(shuffle=shuffle)
    whole = run(case, tmp_path, epochs=2, seed=7)
    saved = read(half_way(tmp_path))
    del saved["lightning_lora"]["random_state"]
    torch.save(saved, tmp_path / "without.ckpt")
    resumed = run(case, tmp_path / "resumed", epochs=2, seed=99, resume=tmp_path / "without.ckpt")
    assert resumed["step"] == whole["step"]
    assert second_epoch(resumed["logged"]) != second_epoch(whole["logged"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("torch"),
        lambda state: state.update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda state: state.update(python=[3, torch.zeros(2, dtype=torch.uint32), None]),
        lambda state: state.update(python="no state"),
        lambda state: state.update(numpy=["MT19937", torch.zeros(2, dtype=torch.uint32), 0, 0, 0.0]),
        lambda state: state.update(loaders=[1, 2]),
    ],
    ids=["no torch", "short torch", "short python", "python text", "short numpy", "loader numbers"],
)
def test_a_damaged_random_state_is_refused_before_anything_is_drawn(damage: Any, tmp_path: Path) -> None:
    run(Case(), tmp_path, epochs=1, seed=7)
    saved = read(half_way(tmp_path))
    damage(saved["lightning_lora"]["random_state"])
    torch.save(saved, tmp_path / "damaged.ckpt")
    with isolate_rng(), pytest.raises(CheckpointError, match="random state in this checkpoint is damaged"):
        torch.manual_seed(0)
        try:
            quiet_trainer(tmp_path, lora(dropout=0.3)).fit(
                NoisyEpochs(dropout=0.3, ruin=1.0),
                shuffled("global stream"),
                loader(),
                ckpt_path=tmp_path / "damaged.ckpt",
            )
        finally:
            assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))


def test_a_file_saved_by_hand_after_the_fit_resumes_the_same(tmp_path: Path) -> None:
    whole = run(Case(), tmp_path, epochs=2, seed=7)
    with isolate_rng():
        pl.seed_everything(7, verbose=False)
        module = NoisyEpochs(dropout=0.3, ruin=1.0)
        trainer = quiet_trainer(tmp_path, lora(dropout=0.3), epochs=1)
        trainer.fit(module, shuffled("global stream"), loader())
        trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    resumed = run(Case(), tmp_path / "resumed", epochs=2, seed=99, resume=tmp_path / "by_hand.ckpt")
    assert same(resumed["adapters"], whole["adapters"])
    assert second_epoch(resumed["logged"]) == second_epoch(whole["logged"])


class Augmented(Dataset[Any]):
    """Adds noise when a row is read, which happens in a worker process."""

    def __init__(self) -> None:
        self.rows = rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows[index]
        return x + 0.1 * torch.randn(x.shape), y


def fit_once(data: Any, folder: Path, *, epochs: int, seed: int, resume: Path | None = None, **options: Any) -> Any:
    """Adapters and training losses of a fit over ``data``."""
    with isolate_rng():
        pl.seed_everything(seed, verbose=False)
        module, recorder = Noisy(dropout=0.3, ruin=1.0), Recorder()
        keeper = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **options)
        trainer = quiet_trainer(folder, lora(dropout=0.3), keeper, epochs=epochs, logger=recorder)
        trainer.fit(module, data, loader(), ckpt_path=resume)
        return adapters_of(module), recorder.of("train_loss_step")


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_in_the_dataset_and_in_its_workers_continues(workers: int, tmp_path: Path) -> None:
    def data() -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)

    whole, losses = fit_once(data(), tmp_path, epochs=2, seed=7)
    resumed, rest = fit_once(data(), tmp_path / "resumed", epochs=2, seed=99, resume=half_way(tmp_path))
    assert rest == losses[STEPS_PER_EPOCH:]
    assert same(resumed, whole)


class Resumable:
    """A loader that knows where it is, as Lightning asks of loaders that resume within an epoch."""

    def __init__(self) -> None:
        self.place = 0
        self.epoch = -1
        self.restored = False

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place, self.epoch = state["place"], state["epoch"]
        self.restored = True

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __iter__(self) -> Iterator[Any]:
        if not self.restored:
            self.place, self.epoch = 0, self.epoch + 1
        self.restored = False
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).split(8)
        while self.place < STEPS_PER_EPOCH:
            self.place += 1
            batch = [rows()[index] for index in order[self.place - 1].tolist()]
            yield torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_a_resume_within_an_epoch_is_exact_with_a_loader_that_can_resume(step: int, tmp_path: Path) -> None:
    whole, losses = fit_once(Resumable(), tmp_path, epochs=2, seed=7, every_n_train_steps=1)
    saved = tmp_path / f"step={step}.ckpt"
    resumed, rest = fit_once(Resumable(), tmp_path / "resumed", epochs=2, seed=99, resume=saved, every_n_train_steps=1)
    assert rest == losses[step:]
    assert same(resumed, whole)


def test_a_resume_within_an_epoch_with_a_plain_loader_warns_that_it_is_not_exact(tmp_path: Path) -> None:
    fit_once(loader(), tmp_path, epochs=1, seed=7, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        _, rest = fit_once(
            loader(), tmp_path / "resumed", epochs=1, seed=99, resume=tmp_path / "step=2.ckpt", every_n_train_steps=1
        )
    assert len(rest) == STEPS_PER_EPOCH - 2


def test_testing_from_a_checkpoint_leaves_the_random_streams_alone(tmp_path: Path) -> None:
    run(Case(), tmp_path, epochs=1, seed=7)
    with isolate_rng():
        drawn = []
        for path in (half_way(tmp_path), None):
            module = Noisy(dropout=0.3, ruin=1.0)
            pl.seed_everything(5, verbose=False)
            quiet_trainer(tmp_path, lora(dropout=0.3)).test(module, loader(), ckpt_path=path, verbose=False)
            drawn.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
        assert drawn[0] == drawn[1]
