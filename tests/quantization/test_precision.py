"""A quantized base in every precision of the Trainer: codes stay, adapters train in fp32 or more, and it merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import (
    BaseMismatchError,
    LoRACallback,
    LoRAConfig,
    MergeConfig,
    QuantizationConfig,
    inject_adapters,
    load_from_checkpoint,
    unmerge_adapters,
)
from tests.conftest import TinyModule
from tests.hazards.runs import checkpointing, fit, trained
from tests.quantization.lives import qlora
from tests.quantization.quantized import FORMATS, codes_of
from tests.states import adapters_of, same

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


def codes_before(form: str, base: dict[str, str]) -> dict[str, Any]:
    """Codes and scales of the base as it is built."""
    module = TinyModule()
    inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig(**{**FORMATS[form], **base}))
    return codes_of(module)


class Casting(TinyModule):
    """Takes batches in any precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.head.bias.dtype))


DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("form", "base"), [("nf4-double", {}), ("nf4", {"storage_dtype": "float32"}), ("int8", {}), ("bf16", {})], ids=str
)
def test_every_precision_trains_resumes_and_merges(
    make_trainer: Any, tmp_path: Path, form: str, precision: str, base: dict[str, str]
) -> None:
    def run(epochs: int, **options: Any) -> tuple[Any, LoRACallback]:
        module = Casting()
        callback = qlora(form, merge=MergeConfig(tolerance=0.9) if epochs == 3 else False, base=base)
        saving = checkpointing(tmp_path, save_top_k=-1, filename="{epoch}")
        saving["callbacks"].append(callback)
        fit(make_trainer(max_epochs=epochs, precision=precision, **saving), module, **options)
        return module, callback

    first, _ = run(1)
    assert same(codes_of(first), codes_before(form, base))
    assert trained(first)
    assert {value.dtype for value in adapters_of(first).values()} == {
        torch.float64 if precision == "64-true" else torch.float32
    }
    merged, callback = run(3)
    resumed, _ = run(3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(dict(merged.state_dict()), dict(resumed.state_dict()))
    assert {parameter.dtype for parameter in merged.parameters()} == {DTYPES[precision]}
    report = callback.merge_report
    assert report is not None
    assert report.output_difference is not None, "compared with the live adapters on a batch of the run"
    unmerge_adapters(merged)
    assert same(codes_of(merged), codes_of(first))


def test_16_mixed_on_the_cpu_becomes_bf16_mixed_and_works(make_trainer: Any) -> None:
    module = Casting()
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        trainer = make_trainer(precision="16-mixed", callbacks=[qlora()])
    fit(trainer, module)
    assert trained(module)


class Pretrained(Casting):
    """Built in ``configure_model``, in Lightning's dtype, with weights that were saved in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {name: self._modules.pop(name) for name in ("backbone", "head")}

    def configure_model(self) -> None:
        for name in self.parts.keys() - self._modules.keys():
            setattr(self, name, copy.deepcopy(self.parts[name]).to(torch.get_default_dtype()))


@pytest.mark.parametrize("form", ["nf4-double", "int8"])
def test_codes_of_rounded_weights_are_found_again_where_the_module_is_built_in_fp32(
    make_trainer: Any, tmp_path: Path, form: str
) -> None:
    """``configure_model`` under bf16-true gives weights in bf16, and ``load_from_checkpoint`` a module in fp32."""
    module = Pretrained()
    saving = checkpointing(tmp_path, filename="rounded")
    saving["callbacks"].append(qlora(form))
    fit(make_trainer(precision="bf16-true", **saving), module)
    assert not same(codes_of(module), codes_before(form, {}))
    with pytest.raises(BaseMismatchError, match="quantized from bfloat16, and here from float32"):
        fit(make_trainer(callbacks=[qlora(form)]), Pretrained(), ckpt_path=tmp_path / "rounded.ckpt")
    found = load_from_checkpoint(Pretrained, tmp_path / "rounded.ckpt")
    assert same(codes_of(found), codes_of(module))
    assert same(adapters_of(found), adapters_of(module))
