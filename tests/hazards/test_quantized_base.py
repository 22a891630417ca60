"""Hazard: a base in 4 or 8 bits, which other code averages, casts, rebuilds, loads and copies as if it were dense."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    QuantizationConfig,
    QuantizationError,
    inject_adapters,
)
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import find_record
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import checkpointing, fit, is_adapter_only, metric, trained
from tests.quantization.quantized import FORMATS, codes_of
from tests.states import adapters_of, read, same

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:Field `model.batch_size` and `model.hparams.batch_size` are mutually exclusive"),
]
KINDS = ("nf4-double", "fp4", "int8", "bf16")


def qlora(form: str = "nf4", *, merge: Any = False, **base: Any) -> LoRACallback:
    quantization = QuantizationConfig(**{**FORMATS[form], **base})
    config = LoRAConfig(rank=2, alpha=4.0)
    return LoRACallback(config, quantization=quantization, merge_on_fit_end=merge, print_report=False)


def codes_before(form: str = "nf4", module: TinyModule | None = None, **base: Any) -> dict[str, Any]:
    """Codes and scales of the base as it is built."""
    module = TinyModule() if module is None else module
    inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig(**{**FORMATS[form], **base}))
    return codes_of(module)


class Lazy(TinyModule):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            super().build()


class BuiltInSetup(TinyModule):
    def build(self) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "head"):
            super().build()


class LoadedInSetup(TinyModule):
    """Its weights come after the callback has quantized those that it was built with."""

    def __init__(self, path: str) -> None:
        super().__init__(seed=5)
        self.path = path

    def setup(self, stage: str) -> None:
        state = torch.load(self.path, weights_only=True)
        self.backbone.load_state_dict({key[9:]: value for key, value in state.items() if key.startswith("backbone.")})
        self.head.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("head.")})


def averaging(kind: str) -> pl.Callback:
    if kind == "swa":
        return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    found = pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="WeightAveraging comes with lightning 2.5.5"
    )
    if kind == "mean":
        return found.WeightAveraging()
    if not hasattr(found, "EMAWeightAveraging"):
        pytest.skip("EMAWeightAveraging comes with lightning 2.6")
    return found.EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize("kind", ["ema", "mean", "swa"])
@pytest.mark.parametrize("form", KINDS)
def test_averaging_leaves_codes_and_scales_alone_and_averages_the_adapters(
    make_trainer: Any, form: str, kind: str
) -> None:
    module, plain = TinyModule(), TinyModule()
    fit(make_trainer(max_epochs=4, callbacks=[qlora(form), averaging(kind)]), module)
    fit(make_trainer(max_epochs=4, callbacks=[qlora(form)]), plain)
    assert same(codes_of(module), codes_before(form))
    assert trained(module)
    assert not same(adapters_of(module), adapters_of(plain))


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaging_leaves_codes_alone_that_are_stored_as_floating_point_numbers(make_trainer: Any, kind: str) -> None:
    module, twin = TinyModule(width=64, seed=1), TinyModule(width=64, seed=1)
    before = codes_before("nf4", twin, storage_dtype="float32")
    assert twin.backbone[0].weight.isnan().any(), "a case that can fail"
    trainer = make_trainer(max_epochs=4, callbacks=[qlora("nf4", storage_dtype="float32"), averaging(kind)])
    trainer.fit(module, make_loader(width=64), make_loader(width=64))
    assert same(codes_of(module), before)


class Tunable(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return make_loader(rows=32, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return make_loader()


@pytest.mark.parametrize(
    ("form", "first"), [("nf4-double", True), ("int8", False)], ids=["listed first", "listed last"]
)
def test_tuners_change_their_setting_and_nothing_else(make_trainer: Any, form: str, first: bool) -> None:
    finders = [
        LearningRateFinder(num_training_steps=15, early_stop_threshold=None),
        BatchSizeFinder(mode="binsearch", steps_per_trial=1, init_val=2, max_trials=2),
    ]
    for finder in finders:
        module = Tunable()
        callbacks = [finder, qlora(form)] if first else [qlora(form), finder]
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module)
        reference = Tunable()
        reference.lr, reference.batch_size = module.lr, module.batch_size
        assert (module.lr, module.batch_size) != (1e-2, 2)
        make_trainer(max_epochs=2, callbacks=[qlora(form)]).fit(reference)
        assert same(codes_of(module), codes_before(form))
        assert trained(module)
        assert same(adapters_of(module), adapters_of(reference))


@pytest.mark.parametrize("form", KINDS)
def test_fitting_twice_goes_on_with_the_same_base(make_trainer: Any, tmp_path: Path, form: str) -> None:
    module, callback = TinyModule(), qlora(form)
    fit(make_trainer(callbacks=[callback]), module)
    first = adapters_of(module)
    options = checkpointing(tmp_path)
    options["callbacks"].append(callback)
    fit(make_trainer(**options), module)
    assert same(codes_of(module), codes_before(form))
    assert not same(adapters_of(module), first)
    assert is_adapter_only(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="quantized already"):
        fit(make_trainer(callbacks=[qlora("nf4", block_size=128)]), module)


class Interrupted(TinyModule):
    error: type[BaseException] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 1 and self.error is not None:
            raise self.error("stop")
        return super().training_step(batch, batch_idx)


@pytest.fixture
def _keep_signal_handlers() -> Iterator[None]:
    # Lightning ignores SIGINT for the rest of the process once it has seen Ctrl-C.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_keep_signal_handlers")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("form", KINDS)
def test_after_an_error_or_ctrl_c_the_module_fits_again(make_trainer: Any, form: str, error: Any) -> None:
    module = Interrupted()
    module.error = error
    with pytest.raises((error, SystemExit)):
        fit(make_trainer(callbacks=[qlora(form)]), module)
    module.error = None
    fit(make_trainer(callbacks=[qlora(form)]), module)
    assert same(codes_of(module), codes_before(form))
    assert trained(module)


@pytest.mark.parametrize("cls", [TinyModule, Lazy, BuiltInSetup])
@pytest.mark.parametrize("form", KINDS)
def test_modules_built_at_any_moment_have_the_same_base_and_end_the_same(
    make_trainer: Any, tmp_path: Path, form: str, cls: type[TinyModule]
) -> None:
    module, plain = cls(), TinyModule()
    options = checkpointing(tmp_path)
    options["callbacks"].append(qlora(form))
    fit(make_trainer(max_epochs=2, **options), module)
    fit(make_trainer(max_epochs=2, callbacks=[qlora(form)]), plain)
    assert same(codes_of(module), codes_before(form))
    assert same(adapters_of(module), adapters_of(plain))
    score = metric(make_trainer(callbacks=[qlora(form)]).test(module, make_loader(), verbose=False))
    fresh = make_trainer(callbacks=[qlora(form)])
    assert metric(fresh.test(cls(), make_loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)) == score


@pytest.mark.parametrize("form", KINDS)
def test_a_dense_base_that_setup_loads_is_quantized_and_a_file_knows_it(
    make_trainer: Any, tmp_path: Path, form: str
) -> None:
    torch.save(TinyModule().state_dict(), tmp_path / "base.pt")
    torch.save(TinyModule(seed=2).state_dict(), tmp_path / "other.pt")
    options = checkpointing(tmp_path)
    options["callbacks"].append(qlora(form))
    module = LoadedInSetup(str(tmp_path / "base.pt"))
    trainer = make_trainer(**options)
    fit(trainer, module)
    assert same(codes_of(module), codes_before(form))
    path, score = tmp_path / "last.ckpt", metric(trainer.test(module, make_loader(), verbose=False))
    for cls, source in ((LoadedInSetup, "base.pt"), (LoadedInSetup, "other.pt"), (None, "")):
        twin = TinyModule() if cls is None else cls(str(tmp_path / source))
        tester = make_trainer(callbacks=[qlora(form)])
        if source == "other.pt":
            with pytest.raises(RuntimeError, match="trained on another base"):
                tester.test(twin, make_loader(), ckpt_path=path, verbose=False)
        else:
            assert metric(tester.test(twin, make_loader(), ckpt_path=path, verbose=False)) == score


def test_a_base_that_is_not_finite_yet_is_refused_by_name(make_trainer: Any) -> None:
    module = TinyModule()
    module.backbone[3].weight.data.fill_(float("nan"))
    with pytest.raises(QuantizationError, match=r"'backbone\.3' can't be quantized.*Load its weights first"):
        fit(make_trainer(callbacks=[qlora()]), module)
    assert find_record(module) is None
    assert type(module.backbone[0]) is nn.Linear


class Captured(TinyModule):
    """Its optimizer gets a list of parameters that was made when the network was built."""

    def build(self) -> None:
        super().build()
        self.captured = list(self.parameters())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        adapters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW([*self.captured, *adapters], lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("form", KINDS)
def test_an_optimizer_that_holds_the_dense_weights_lets_them_go(make_trainer: Any, form: str) -> None:
    module = Captured()
    trainer = make_trainer(max_epochs=2, callbacks=[qlora(form)])
    fit(trainer, module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert trained(module)


def test_a_base_shared_by_two_names_is_stored_once_and_trains(make_trainer: Any, tmp_path: Path) -> None:
    class Shared(TinyModule):
        def build(self) -> None:
            super().build()
            self.again = self.backbone

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.again(self.backbone(x)))

    module = Shared()
    options = checkpointing(tmp_path)
    options["callbacks"].append(qlora())
    fit(make_trainer(**options), module)
    assert module.again[0] is module.backbone[0]
    assert isinstance(module.again[0], QuantizedLayer)
    score = metric(make_trainer(callbacks=[qlora()]).test(module, make_loader(), verbose=False))
    tester = make_trainer(callbacks=[qlora()])
    assert metric(tester.test(Shared(), make_loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)) == score
    assert not [key for key in read(tmp_path / "last.ckpt")["state_dict"] if "absmax" in key or "quant" in key]
    assert module.backbone[0].in_features == WIDTH
