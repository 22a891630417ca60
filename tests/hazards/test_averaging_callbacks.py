"""Hazard: averaging callbacks copy the module, base and all, at a moment and in a way of their own."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_lora import UnsupportedSetupError
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import adapters_of, base_of, read, same

weight_averaging = pytest.importorskip(
    "lightning.pytorch.callbacks.weight_averaging", reason="WeightAveraging comes with lightning 2.5.5"
)
WeightAveraging = weight_averaging.WeightAveraging
EMAWeightAveraging = getattr(weight_averaging, "EMAWeightAveraging", None)
needs_ema = pytest.mark.skipif(EMAWeightAveraging is None, reason="EMAWeightAveraging comes with lightning 2.6")
# The callback's own configure_model patch is there to adapt lazily built models; nothing is sharded.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),  # the frozen norm layer
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


class NormModule(TinyModule):
    def build(self) -> None:
        super().build()
        self.backbone.insert(1, nn.BatchNorm1d(WIDTH))


class Lazy(TinyModule):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            super().build()


def averaging(kind: str) -> pl.Callback:
    if kind == "ema":
        if EMAWeightAveraging is None:
            pytest.skip("EMAWeightAveraging comes with lightning 2.6")
        return EMAWeightAveraging(decay=0.9)
    if kind == "multi":
        return WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if kind == "swa":
        return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    return WeightAveraging()


ALL = ["average", "ema", "multi", "swa"]


@pytest.mark.parametrize("kind", ALL)
def test_averaging_after_us_trains_and_leaves_the_base_bitwise_as_it_was(make_trainer: Any, kind: str) -> None:
    module = NormModule()
    before = base_of(module)
    fit(make_trainer(max_epochs=3, callbacks=[lora(), averaging(kind)]), module)
    assert trained(module)
    assert same(base_of(module), before)


@pytest.mark.parametrize("kind", ALL)
def test_averaging_before_us_is_refused(make_trainer: Any, kind: str) -> None:
    trainer = make_trainer(callbacks=[averaging(kind), lora()])
    with pytest.raises(UnsupportedSetupError, match="list LoRACallback before it"):
        fit(trainer, TinyModule())


@pytest.mark.parametrize("kind", ["average", "ema", "multi"])
def test_averaged_checkpoints_hold_adapters_only_and_score_as_the_averaged_model_did(
    make_trainer: Any, tmp_path: Any, kind: str
) -> None:
    module, loader = NormModule(), make_loader()
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    trainer = make_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[lora(), averaging(kind), saver])
    fit(trainer, module)
    assert is_adapter_only(saver.best_model_path)
    assert set(read(saver.best_model_path)["current_model_state"]) == set(adapters_of(module))
    best = float(saver.best_model_score)
    tester = make_trainer(callbacks=[lora()])
    for candidate in (module, NormModule()):
        assert metric(tester.validate(candidate, loader, ckpt_path=saver.best_model_path, verbose=False)) == best


@pytest.mark.parametrize("kind", ["average", "ema", "multi"])
def test_averaging_resumes_bitwise(make_trainer: Any, tmp_path: Any, kind: str) -> None:
    def run(epochs: int, callback: pl.Callback, folder: str, resume: Any = None) -> tuple[TinyModule, str]:
        module = NormModule()
        saver = ModelCheckpoint(dirpath=tmp_path / folder, save_top_k=-1)
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[lora(), callback, saver])
        fit(trainer, module, ckpt_path=resume)
        return module, saver.best_model_path

    whole, _ = run(4, averaging(kind), "whole")
    _, half = run(2, averaging(kind), "half")
    resumed, _ = run(4, averaging(kind), "resumed", half)
    assert same(whole.state_dict(), resumed.state_dict())


@needs_ema
def test_the_average_is_what_is_merged_at_fit_end(make_trainer: Any) -> None:
    averaged = TinyModule()
    fit(make_trainer(max_epochs=2, callbacks=[lora(), averaging("ema")]), averaged)
    merged = TinyModule()
    fit(make_trainer(max_epochs=2, callbacks=[lora(merge=True), averaging("ema")]), merged)
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(merged(x), averaged(x))
    assert type(merged.head) is nn.Linear


@needs_ema
def test_averaging_a_model_built_in_configure_model_works(make_trainer: Any, tmp_path: Any) -> None:
    module, saver = Lazy(), ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(), averaging("ema"), saver])
    fit(trainer, module)
    assert trained(module)
    assert is_adapter_only(saver.best_model_path)


def test_stochastic_weight_averaging_of_a_model_that_it_copied_unbuilt_is_refused(make_trainer: Any) -> None:
    trainer = make_trainer(max_epochs=2, callbacks=[lora(), averaging("swa")])
    with pytest.raises(UnsupportedSetupError, match="StochasticWeightAveraging copied the module before"):
        fit(trainer, Lazy())


def test_stochastic_weight_averaging_averages_the_adapters(make_trainer: Any) -> None:
    plain, averaged = TinyModule(), TinyModule()
    fit(make_trainer(max_epochs=3, callbacks=[lora()]), plain)
    fit(make_trainer(max_epochs=3, callbacks=[lora(), averaging("swa")]), averaged)
    assert trained(averaged)
    assert not same(adapters_of(plain), adapters_of(averaged))


def test_stochastic_weight_averaging_does_not_reset_frozen_norm_statistics(make_trainer: Any) -> None:
    module = NormModule()
    module.backbone[1].running_mean.fill_(0.5)
    trainer = make_trainer(max_epochs=3, callbacks=[lora(), averaging("swa")])
    fit(trainer, module)
    assert torch.equal(module.backbone[1].running_mean, torch.full((WIDTH,), 0.5))
    assert trainer.current_epoch == 3


def test_stochastic_weight_averaging_of_a_trained_and_a_frozen_norm_layer_is_refused(make_trainer: Any) -> None:
    module = NormModule()
    module.backbone.append(nn.BatchNorm1d(WIDTH))
    last = f"backbone.{len(module.backbone) - 1}"
    trainer = make_trainer(max_epochs=3, callbacks=[lora(modules_to_save=[last]), averaging("swa")])
    with pytest.raises(UnsupportedSetupError, match="resets the running statistics"):
        fit(trainer, module)


@needs_ema
def test_what_is_equal_stays_equal_under_an_average_also_in_a_copy_of_the_callback() -> None:
    from lightning_lora.averaging import keep_equal

    callback = averaging("ema")
    callback.setup(pl.Trainer(accelerator="cpu", logger=False), module := TinyModule(), "fit")
    keep_equal(callback)
    keep_equal(copy.deepcopy(callback))
    callback._average_model.update_parameters(module)
    callback._average_model.update_parameters(module)
    assert same(base_of(callback._average_model.module), base_of(module))
