"""What a checkpoint weighs, and that every way to write one writes the trained tensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_lora import MergeConfig
from tests.integration.lives import ADAPTERS, LIGHTNINGS_ADVICE, best_and_last, lora, quiet_trainer
from tests.integration.networks import Eager, loader
from tests.states import adapters_of, read, same

pytestmark = LIGHTNINGS_ADVICE


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.LightningModule, Path]:
    """A Llama of 4 layers, hidden size 256, trained with adapters of rank 8 on every linear layer."""
    pytest.importorskip("transformers")
    from tests.integration.language import Language, token_loader

    folder = tmp_path_factory.mktemp("wide")
    module = Language("llama-wide")
    keeper = ModelCheckpoint(dirpath=folder, filename="full")
    trainer = quiet_trainer(folder, lora(rank=8), keeper, epochs=1)
    trainer.fit(module, token_loader(), token_loader())
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return module, folder


def test_a_full_checkpoint_weighs_adapters_and_their_optimizer_state_within_5_percent(
    wide: tuple[pl.LightningModule, Path],
) -> None:
    module, folder = wide
    saved = read(folder / "full.ckpt")
    needed = size_of(adapters_of(module).values()) + size_of(tensors_in(saved["optimizer_states"]))
    assert needed > 3 * size_of(adapters_of(module).values())
    size = (folder / "full.ckpt").stat().st_size
    print(f"full checkpoint: {size} bytes, {size / needed - 1:.2%} above adapters + optimizer state")
    assert needed < size < 1.05 * needed


def test_a_weights_only_checkpoint_weighs_the_adapters_within_5_percent(wide: tuple[pl.LightningModule, Path]) -> None:
    module, folder = wide
    needed = size_of(adapters_of(module).values())
    size = (folder / "weights.ckpt").stat().st_size
    print(f"weights-only checkpoint: {size} bytes, {size / needed - 1:.2%} above the adapters")
    assert needed < size < 1.05 * needed


@pytest.mark.parametrize("name", ["full.ckpt", "weights.ckpt"])
def test_no_frozen_tensor_is_in_it(name: str, wide: tuple[pl.LightningModule, Path]) -> None:
    module, folder = wide
    saved = read(folder / name)
    assert set(saved["state_dict"]) == set(adapters_of(module))
    known = [*saved["state_dict"].values(), *tensors_in(saved.get("optimizer_states", []))]
    manifest = tensors_in(saved["lightning_lora"])
    scores = 8  # of ModelCheckpoint
    assert size_of(tensors_in(saved)) <= size_of(known) + size_of(manifest) + scores
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert all(tensor.shape != p.shape for tensor in manifest for p in frozen)
    assert size_of(manifest) < 0.01 * size_of(frozen)


class Watching(TorchCheckpointIO):
    """Keeps what was written, by file name; some files are gone after the run."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written[Path(path).name] = read(path)


class SavesByHand(pl.Callback):
    """Saves in the middle of an epoch and from hooks of every kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        trainer.save_checkpoint(self.folder / f"{name}-weights.ckpt", weights_only=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "train_start")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.save(trainer, "batch_end")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "validation_start")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "fit_end")


def assert_adapters_only(checkpoint: dict[str, Any]) -> None:
    assert set(checkpoint["state_dict"]) == ADAPTERS
    assert {"adapters", "base", "configs"} <= set(checkpoint["lightning_lora"])
    adapter_shapes = {tuple(value.shape) for value in checkpoint["state_dict"].values()}
    for tensor in tensors_in(checkpoint.get("optimizer_states", [])):
        assert tensor.dim() == 0 or tuple(tensor.shape) in adapter_shapes


def test_every_way_to_save_in_and_after_a_fit_is_adapter_only(tmp_path: Path) -> None:
    watching = Watching()
    trainer = quiet_trainer(
        tmp_path,
        lora(),
        best_and_last(tmp_path),
        best_and_last(tmp_path, filename="weights-{epoch}", save_last=False, save_weights_only=True, mode="max"),
        ModelCheckpoint(dirpath=tmp_path, filename="step-{step}", every_n_train_steps=3, save_top_k=-1),
        SavesByHand(tmp_path),
        plugins=[watching],
    )
    module = Eager()
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "after_fit.ckpt")
    trainer.save_checkpoint(tmp_path / "after_fit-weights.ckpt", weights_only=True)
    by_hand = {
        f"{name}{kind}.ckpt"
        for name in ("train_start", "batch_end", "validation_start", "fit_end", "after_fit")
        for kind in ("", "-weights")
    }
    by_callbacks = {
        *("epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt", "weights-epoch=0.ckpt", "weights-epoch=1.ckpt"),
        *("step-step=3.ckpt", "step-step=6.ckpt"),
    }
    assert set(watching.written) == by_hand | by_callbacks
    for name, checkpoint in watching.written.items():
        assert_adapters_only(checkpoint)
        assert ("optimizer_states" in checkpoint) == ("weights" not in name)
    assert same(watching.written["after_fit.ckpt"]["state_dict"], adapters_of(module))


def test_a_file_saved_after_an_in_place_merge_holds_the_adapters_and_resumes(tmp_path: Path) -> None:
    keeper = best_and_last(tmp_path)
    trainer = quiet_trainer(tmp_path, lora(merge_on_fit_end=MergeConfig()), keeper)
    module = Eager(ruin=1.0)
    trainer.fit(module, loader(), loader())
    merged = {key: value.clone() for key, value in module.state_dict().items()}
    assert not adapters_of(module)
    trainer.save_checkpoint(tmp_path / "merged_module.ckpt")
    trainer.save_checkpoint(tmp_path / "merged_module-weights.ckpt", weights_only=True)
    for name in ("merged_module.ckpt", "merged_module-weights.ckpt"):
        assert_adapters_only(read(tmp_path / name))
        assert same(read(tmp_path / name)["state_dict"], read(tmp_path / "last.ckpt")["state_dict"])
    assert same(module.state_dict(), merged)

    whole, resumed = Eager(ruin=1.0), Eager(ruin=1.0)
    quiet_trainer(tmp_path, lora(), epochs=3).fit(whole, loader(), loader())
    longer = quiet_trainer(tmp_path, lora(), epochs=3)
    longer.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "merged_module.ckpt")
    assert longer.global_step == 12
    assert same(adapters_of(resumed), adapters_of(whole))


def test_an_exception_saves_the_adapters_only(tmp_path: Path) -> None:
    watching = Watching()
    trainer = quiet_trainer(tmp_path, lora(), OnExceptionCheckpoint(tmp_path), plugins=[watching])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Eager(fail_at=2), loader(), loader())
    assert set(watching.written) == {"on_exception.ckpt"}
    assert_adapters_only(watching.written["on_exception.ckpt"])


def test_a_file_written_in_the_background_holds_the_adapters_of_its_epoch(tmp_path: Path) -> None:
    module, plain = Eager(), Eager()
    (tmp_path / "background").mkdir()
    quiet_trainer(tmp_path, lora(), best_and_last(tmp_path)).fit(plain, loader(), loader())
    trainer = quiet_trainer(
        tmp_path, lora(), best_and_last(tmp_path / "background"), plugins=[AsyncCheckpointIO(TorchCheckpointIO())]
    )
    trainer.fit(module, loader(), loader())
    for name in ("epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"):
        written = read(tmp_path / "background" / name)
        assert_adapters_only(written)
        assert same(written["state_dict"], read(tmp_path / name)["state_dict"])


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_the_temporary_file_of_the_learning_rate_finder_is_adapter_only_and_restores_the_adapters(
    tmp_path: Path,
) -> None:
    class WithRate(Eager):
        def __init__(self) -> None:
            super().__init__(ruin=1.0)
            self.lr = 0.02

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    class Start(pl.Callback):
        adapters: dict[str, Tensor]
        lr: float

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.adapters, self.lr = adapters_of(pl_module), trainer.optimizers[0].param_groups[0]["lr"]

    watching, start = Watching(), Start()
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-4, max_lr=1.0)
    trainer = quiet_trainer(tmp_path, finder, lora(), start, epochs=1, plugins=[watching])
    module = WithRate()
    trainer.fit(module, loader(), loader())
    (temporary,) = watching.written.values()
    assert_adapters_only(temporary)
    assert same(start.adapters, temporary["state_dict"])
    assert all((start.adapters[key] == 0).all() for key in start.adapters if key.endswith("lora_B"))
    assert start.lr == module.lr
    assert any((adapters_of(module)[key] != 0).any() for key in start.adapters if key.endswith("lora_B"))
