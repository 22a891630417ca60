"""Hazard: a precision that casts the module, after the injection and after the restoring of a checkpoint.

There is no 16-mixed on the CPU: Lightning runs bf16-mixed in its place, and says so.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import UnsupportedSetupError, guards, load_from_checkpoint
from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import adapters_of, base_of, read, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")

# precision -> dtype of the base in the run, dtype of the adapters
DTYPES = {
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.float32),
    "16-true": (torch.float16, torch.float32),
    "64-true": (torch.float64, torch.float64),
}


class Casting(TinyModule):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype))


class Lazy(Casting):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            super().build()


def run(
    make_trainer: Any, folder: Path, precision: str, epochs: int, resume: Any = None, cls: Any = Casting
) -> tuple[TinyModule, str, Any]:
    module, saver = cls(), ModelCheckpoint(dirpath=folder)
    callbacks = [lora(dropout=0.1), saver]
    trainer = make_trainer(max_epochs=epochs, precision=precision, enable_checkpointing=True, callbacks=callbacks)
    torch.manual_seed(0)
    fit(trainer, module, ckpt_path=resume)
    return module, saver.best_model_path, trainer


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("cls", [Casting, Lazy])
def test_adapters_train_in_fp32_or_wider_over_a_base_of_any_precision(
    make_trainer: Any, tmp_path: Path, precision: str, cls: Any
) -> None:
    module, path, _ = run(make_trainer, tmp_path, precision, 2, cls=cls)
    dtype, adapter_dtype = DTYPES[precision]
    assert trained(module)
    assert {value.dtype for value in adapters_of(module).values()} == {adapter_dtype}
    assert {value.dtype for value in base_of(module).values()} == {dtype}
    assert {value.dtype for value in read(path)["state_dict"].values()} == {adapter_dtype}
    assert is_adapter_only(path)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_base_is_cast_and_otherwise_bitwise_what_it_was(make_trainer: Any, tmp_path: Path, precision: str) -> None:
    module, _, _ = run(make_trainer, tmp_path, precision, 2)
    expected = {key: value.to(DTYPES[precision][0]) for key, value in TinyModule().state_dict().items()}
    assert same(base_of(module), expected)


@pytest.mark.parametrize("precision", DTYPES)
def test_an_adapter_of_every_precision_resumes_bitwise(make_trainer: Any, tmp_path: Path, precision: str) -> None:
    whole, _, _ = run(make_trainer, tmp_path / "whole", precision, 3)
    _, first, _ = run(make_trainer, tmp_path / "parts", precision, 1)
    resumed, _, _ = run(make_trainer, tmp_path / "parts", precision, 3, first)
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("precision", DTYPES)
def test_a_file_scores_the_same_in_a_new_module_in_the_same_precision(
    make_trainer: Any, tmp_path: Path, precision: str
) -> None:
    module, path, trainer = run(make_trainer, tmp_path, precision, 2)
    score = metric(trainer.test(module, make_loader(), verbose=False))
    tester = make_trainer(precision=precision, callbacks=[lora(dropout=0.1)])
    assert metric(tester.test(Casting(), make_loader(), ckpt_path=path, verbose=False)) == score
    assert metric(trainer.test(module, make_loader(), ckpt_path="best", verbose=False)) == score


@pytest.mark.parametrize("precision", DTYPES)
def test_a_file_of_every_precision_opens_in_a_plain_module(make_trainer: Any, tmp_path: Path, precision: str) -> None:
    module, path, _ = run(make_trainer, tmp_path, precision, 1)
    twin = load_from_checkpoint(Casting, path)
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in adapters_of(module).items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_merge_after_a_run_in_any_precision_keeps_the_outputs(
    make_trainer: Any, tmp_path: Path, precision: str
) -> None:
    module, callback = Casting(), lora(merge=True)
    # Long enough for an update that survives rounding to bf16.
    fit(make_trainer(max_epochs=8, precision=precision, callbacks=[callback]), module)
    assert type(module.head) is nn.Linear
    assert callback.merge_report.max_relative_error < 0.3
    assert next(module.parameters()).dtype is DTYPES[precision][0]


def test_small_steps_are_not_lost_under_bf16_true(make_trainer: Any) -> None:
    class Slow(Casting):
        def on_train_start(self) -> None:
            for key, value in self.state_dict().items():
                if key.endswith("lora_B"):
                    value.fill_(1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    module = Slow()
    fit(make_trainer(precision="bf16-true", callbacks=[lora()]), module)
    step = module.state_dict()["backbone.3.adapters.default.lora_B"] - 1.0
    assert 0 < float(step.abs().max()) < torch.finfo(torch.bfloat16).eps / 2


def test_16_mixed_on_the_cpu_becomes_bf16_mixed_and_works(make_trainer: Any) -> None:
    module = Casting()
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        trainer = make_trainer(precision="16-mixed", callbacks=[lora()])
    fit(trainer, module)
    assert trainer.precision == "bf16-mixed"
    assert trained(module)


def test_a_file_moves_between_precisions_without_being_taken_for_another_base(
    make_trainer: Any, tmp_path: Path
) -> None:
    for saved in ("32-true", "bf16-true", "16-true"):
        _, path, _ = run(make_trainer, tmp_path / saved, saved, 1)
        for loaded in ("32-true", "bf16-true", "64-true"):
            module = Casting()
            tester = make_trainer(precision=loaded, callbacks=[lora(dropout=0.1)])
            tester.test(module, make_loader(), ckpt_path=path, verbose=False)
            assert trained(module)


def test_a_base_cast_by_the_user_resumes(make_trainer: Any, tmp_path: Path) -> None:
    class Half(Casting):
        def build(self) -> None:
            super().build()
            self.to(torch.bfloat16)

    whole, _, _ = run(make_trainer, tmp_path / "whole", "32-true", 2, cls=Half)
    _, first, _ = run(make_trainer, tmp_path / "parts", "32-true", 1, cls=Half)
    resumed, _, _ = run(make_trainer, tmp_path / "parts", "32-true", 2, first, cls=Half)
    assert same(resumed.state_dict(), whole.state_dict())
    assert {value.dtype for value in adapters_of(resumed).values()} == {torch.float32}


def test_the_bitsandbytes_precision_plugin_is_refused(make_trainer: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="the plugin needs bitsandbytes")
    from lightning.pytorch.plugins import BitsandbytesPrecision

    from lightning_lora.callback import LoRACallback
    from lightning_lora.guards import check_trainer

    callback = lora()
    trainer = make_trainer(callbacks=[callback])
    # Lightning's own connector refuses it on a CPU before any callback could.
    trainer.strategy._precision_plugin = BitsandbytesPrecision("nf4")
    with pytest.raises(UnsupportedSetupError, match="quantizes every linear layer after the injection"):
        check_trainer(trainer, callback, kind=LoRACallback, merges=False)


EMULATED = {"bf16-mixed": "bfloat16", "bf16-true": "bfloat16", "16-true": "float16"}


@pytest.mark.parametrize("precision", DTYPES)
def test_a_cpu_that_computes_16_bits_value_by_value_is_warned_of(
    make_trainer: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "is_emulated", lambda dtype: True)
    named = EMULATED.get(precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer(max_epochs=1, precision=precision, callbacks=[lora()]), Casting())
    found = [str(each.message) for each in caught if "no instructions for" in str(each.message)]
    assert len(found) == (named is not None)
    assert all(f"for {named}, " in text and "32-true" in text for text in found)


def test_a_base_in_16_bits_is_warned_of_under_any_precision_and_a_cpu_that_has_them_is_not(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Casting().to(torch.bfloat16)
    monkeypatch.setattr(guards, "is_emulated", lambda dtype: False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This CPU has no instructions")
        fit(make_trainer(max_epochs=1, callbacks=[lora()]), module)
    monkeypatch.setattr(guards, "is_emulated", lambda dtype: dtype == torch.bfloat16)
    with pytest.warns(UserWarning, match="no instructions for bfloat16"):
        fit(make_trainer(max_epochs=1, callbacks=[lora()]), Casting().to(torch.bfloat16))
