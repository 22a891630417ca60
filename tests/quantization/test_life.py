"""A run over a quantized base: it trains, its files hold adapters only, it resumes bitwise, and it merges to dense."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterMismatchError,
    BaseMismatchError,
    LoRAConfig,
    MergeConfig,
    QuantizationConfig,
    inject_adapters,
    load_from_checkpoint,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.quantized_layer import QuantizedLayer
from tests.hazards.runs import is_adapter_only, metric, trained
from tests.integration.lives import LIGHTNINGS_ADVICE, quiet_trainer
from tests.integration.networks import Eager, loader
from tests.integration.process import in_new_process
from tests.quantization.lives import continue_all, fit, outputs, qlora, seen
from tests.quantization.plain import open_merged
from tests.quantization.quantized import FORMATS, codes_of
from tests.states import adapters_of, read, same

pytest.importorskip("bitsandbytes")


pytestmark = LIGHTNINGS_ADVICE


def start(form: str | None) -> Eager:
    """The module as it is before the first step, with what an injection makes of its base."""
    module = Eager(dropout=0.3, ruin=1.0)
    quantization = None if form is None else QuantizationConfig(**FORMATS[form])
    inject_adapters(module, LoRAConfig(rank=2, alpha=8.0), quantization=quantization)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each format: two epochs in one go, their folder, and the second epoch in a new process."""
    found: dict[str, Any] = {}
    for form in FORMATS:
        folder = tmp_path_factory.mktemp(form)
        found[form] = {"folder": folder, "run": fit(folder, form)}
    resumed = in_new_process(continue_all, [(form, str(found[form]["folder"])) for form in FORMATS])
    return {form: {**parts, "elsewhere": resumed[form]} for form, parts in found.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_adapters_train_after_a_validation_and_codes_and_scales_stay(form: str, runs: Any) -> None:
    folder = runs[form]["folder"]
    halves = [read(folder / f"step={step}.ckpt")["state_dict"] for step in (4, 8)]
    moved = [key for key in halves[0] if not torch.equal(halves[0][key], halves[1][key])]
    assert moved == list(halves[0]), "the second epoch comes after a validation"
    assert trained(runs[form]["run"][1])
    assert same(codes_of(runs[form]["run"][1]), codes_of(start(form)))


@pytest.mark.parametrize("form", FORMATS)
def test_files_hold_adapters_only_on_every_way_to_save(form: str, runs: Any, tmp_path: Path) -> None:
    trainer, module, _ = runs[form]["run"]
    trainer.save_checkpoint(tmp_path / "hand.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    files = [*runs[form]["folder"].glob("*.ckpt"), *tmp_path.glob("*.ckpt")]
    assert len(files) == 5
    for path in files:
        assert is_adapter_only(path)
        assert list(read(path)["state_dict"]) == list(adapters_of(module))
        assert read(path)["lightning_lora"]["quantization"] == QuantizationConfig(**FORMATS[form]).to_dict()


@pytest.mark.parametrize("form", FORMATS)
def test_a_resume_is_bitwise_here_and_in_a_new_process(form: str, runs: Any, tmp_path: Path) -> None:
    whole = seen(*runs[form]["run"])
    here = seen(*fit(tmp_path, form, seed=99, resume=runs[form]["folder"] / "step=4.ckpt"))
    assert len(whole["losses"]) == 8
    for resumed in (here, runs[form]["elsewhere"]):
        assert resumed["step"] == whole["step"] == 8
        assert resumed["losses"] == whole["losses"][4:]
        for part in ("adapters", "codes", "optimizer"):
            assert same(resumed[part], whole[part]), part


@pytest.mark.parametrize("form", FORMATS)
def test_testing_and_predicting_from_a_file_give_what_the_run_gave(form: str, runs: Any) -> None:
    trainer, module, _ = runs[form]["run"]
    best = metric(trainer.test(module, loader(), ckpt_path="best", verbose=False))
    live = metric(trainer.validate(module, loader(), verbose=False))
    path = trainer.checkpoint_callback.best_model_path
    fresh = quiet_trainer(runs[form]["folder"], qlora(form, dropout=0.3))
    assert metric(fresh.test(Eager(), loader(), ckpt_path=path, verbose=False)) == best
    assert metric(fresh.validate(module, loader(), verbose=False)) == live
    plain = quiet_trainer(runs[form]["folder"])
    assert best != metric(plain.test(Eager(), loader(), verbose=False))


@pytest.mark.parametrize("form", FORMATS)
def test_validating_before_the_fit_changes_nothing_of_it(form: str, runs: Any, tmp_path: Path) -> None:
    module = Eager(dropout=0.3, ruin=1.0)
    before = quiet_trainer(tmp_path, qlora(form, dropout=0.3)).validate(module, loader(), verbose=False)
    assert before[0]["val_loss"] > 0
    _, module, _ = fit(tmp_path, form, module=module)
    assert same(codes_of(module), codes_of(runs[form]["run"][1]))
    assert same(adapters_of(module), adapters_of(runs[form]["run"][1]))


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_alone_rebuilds_the_module_with_its_quantized_base(form: str, runs: Any) -> None:
    path = runs[form]["folder"] / "last.ckpt"
    module = load_from_checkpoint(Eager, path)
    assert same(codes_of(module), codes_of(runs[form]["run"][1]))
    assert same(adapters_of(module), read(path)["state_dict"])
    assert torch.equal(runs[form]["elsewhere"]["rebuilt"], outputs(module))


@pytest.mark.parametrize("saved", [None, "nf4", "int8", "bf16"])
def test_a_file_of_another_base_is_refused_with_advice(saved: str | None, runs: Any, tmp_path: Path) -> None:
    path = fit(tmp_path, None)[0].checkpoint_callback.last_model_path if saved is None else None
    path = path or runs[saved]["folder"] / "last.ckpt"
    for form in {None, "nf4", "nf4-double", "fp4", "int8", "bf16"} - {saved}:
        module = Eager(dropout=0.3, ruin=1.0)
        with pytest.raises(BaseMismatchError, match=r"Use the same quantization=QuantizationConfig\(") as caught:
            quiet_trainer(tmp_path, qlora(form, dropout=0.3)).test(module, loader(), ckpt_path=path, verbose=False)
        for name in (saved, form):
            assert ("dense base" if name is None else "quantized with") in str(caught.value)
        with pytest.raises(BaseMismatchError):
            fit(tmp_path / "resumed", form, resume=path, epochs=3)


def test_another_base_in_the_same_format_is_refused(runs: Any, tmp_path: Path) -> None:
    module = Eager(dropout=0.3, ruin=1.0)
    module.backbone[0].weight.data *= 1.1  # the same codes with other scales
    twin = start("nf4")
    inject_adapters(module, LoRAConfig(rank=2, alpha=8.0, dropout=0.3), quantization=QuantizationConfig())
    assert torch.equal(module.backbone[0].weight.data, twin.backbone[0].weight.data)
    with pytest.raises(BaseMismatchError, match="values of"):
        fit(tmp_path, "nf4", module=module, resume=runs["nf4"]["folder"] / "last.ckpt", epochs=3)


def test_only_the_dtype_of_the_product_may_differ(runs: Any, tmp_path: Path) -> None:
    path = runs["nf4"]["folder"] / "step=4.ckpt"
    fit(tmp_path, "nf4", base={"compute_dtype": "bfloat16"}, resume=path)
    with pytest.raises(BaseMismatchError, match="block_size=128"):
        fit(tmp_path, "nf4", base={"block_size": 128}, resume=path)
    with pytest.raises(AdapterMismatchError):
        fit(tmp_path, "nf4", rank=4, resume=path)


@dataclasses.dataclass
class Kept(pl.Callback):
    """Notes what the module gives with live adapters, just before the merge."""

    outputs: Any = None
    codes: Any = None
    merged: Any = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.outputs, self.codes = outputs(pl_module), codes_of(pl_module)
        pl_module.train()


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for form in FORMATS:
        folder, kept = tmp_path_factory.mktemp(f"merge-{form}"), Kept()
        config = MergeConfig(output_dir=str(folder / "artifact"))
        found[form] = (*fit(folder, form, merge=config, callbacks=(kept,)), kept, folder)
        kept.merged = {key: value.clone() for key, value in found[form][1].state_dict().items()}
    return found


@pytest.fixture(scope="module")
def opened(merges: Any) -> dict[str, Any]:
    """What a process in which neither package can be imported makes of the artifacts."""
    paths = {form: str(merges[form][-1] / "artifact" / "merged.ckpt") for form in FORMATS}
    found: dict[str, Any] = in_new_process(open_merged, paths, without=("lightning_lora", "bitsandbytes"))
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_a_merge_gives_a_dense_module_that_computes_the_same(form: str, merges: Any) -> None:
    trainer, module, _, kept, folder = merges[form]
    assert [type(module.backbone[index]) for index in (0, 4)] == [nn.Linear, nn.Linear]
    assert type(module.head) is nn.Linear
    assert not any(isinstance(child, QuantizedLayer) for child in module.modules())
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(module), kept.outputs, rtol=1e-5, atol=1e-5)
    merged = metric(trainer.test(module, loader(), verbose=False))
    best = metric(trainer.test(module, loader(), ckpt_path=folder / "last.ckpt", verbose=False))
    assert merged == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_the_artifact_opens_where_neither_package_can_be_imported(form: str, merges: Any, opened: Any) -> None:
    kept, found = merges[form][3], opened[form]
    assert opened["imported"] == []
    assert same(found["state"], kept.merged)
    assert found["state"].keys() == Eager().state_dict().keys()
    torch.testing.assert_close(found["outputs"], kept.outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_merge_and_its_undoing_are_exact(form: str, runs: Any) -> None:
    module = load_from_checkpoint(Eager, runs[form]["folder"] / "last.ckpt")
    state, live = {key: value.clone() for key, value in module.state_dict().items()}, outputs(module)
    layer = module.backbone[0]
    expected = layer.dequantize(torch.float32) + layer.adapter("default").weight_update(layer.weight_matrix())
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for _ in range(2):
        merge_adapters(module)
        torch.testing.assert_close(module.backbone[0].weight.data, expected)
        torch.testing.assert_close(outputs(module), live, rtol=1e-5, atol=1e-5)
        unmerge_adapters(module)
        assert same(dict(module.state_dict()), state)
        assert torch.equal(outputs(module), live)
        assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == flags


@pytest.mark.parametrize("form", ["nf4-double", "int8", "bf16"])
def test_a_merged_module_fits_again_on_its_quantized_base(form: str, merges: Any, tmp_path: Path) -> None:
    _, module, _, kept, folder = merges[form]
    module = load_from_checkpoint(Eager, folder / "last.ckpt")
    before = adapters_of(module)
    merge_adapters(module)
    _, module, _ = fit(tmp_path, form, module=module)
    assert same(codes_of(module), kept.codes)
    assert not any(torch.equal(value, before[key]) for key, value in adapters_of(module).items())
