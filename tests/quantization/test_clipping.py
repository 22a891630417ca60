"""Clipped blocks: nearer to the weights, in the same form as any others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, MergeConfig, QuantizationConfig, inject_adapters, merge_adapters
from tests.integration.language import Language, token_loader
from tests.integration.lives import LIGHTNINGS_ADVICE, quiet_trainer
from tests.quantization.quantized import FOUR_BIT, codes_of, dense, quantized
from tests.states import read, same

pytest.importorskip("bitsandbytes")
clipping = pytest.importorskip("lightning_lora.quantization.clipping")
pytestmark = LIGHTNINGS_ADVICE


def normal(out: int = 64, inner: int = 256, dtype: torch.dtype = torch.float32) -> Any:
    layer = dense(out, inner, bias=False)
    layer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return layer.to(dtype)


def block_errors(layer: Any, plain: Any, block: int = 64) -> torch.Tensor:
    return (layer.dequantize(torch.float32) - plain.weight.float()).view(-1, block).square().sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FOUR_BIT)
def test_the_error_gets_smaller_and_the_form_and_size_stay(form: str, dtype: torch.dtype) -> None:
    plain = normal(dtype=dtype)
    usual, clipped = (quantized(form, layer=normal(dtype=dtype), clip_search=searched) for searched in (False, True))
    gain = block_errors(clipped, plain).sum() / block_errors(usual, plain).sum()
    assert 0.6 < gain < 0.95
    before, after = codes_of(usual), codes_of(clipped)
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert type(clipped) is type(usual)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_no_block_gets_worse(block: int) -> None:
    usual, clipped = (
        quantized("nf4", layer=normal(), block_size=block, clip_search=searched) for searched in (False, True)
    )
    assert (block_errors(clipped, normal(), block) <= block_errors(usual, normal(), block)).all()


def test_an_outlier_is_clipped_only_where_that_is_worth_it() -> None:
    mild, wild = torch.zeros(64), torch.zeros(64)
    mild[:63], mild[63] = torch.linspace(-1, 1, 63), 1.1
    wild[:63], wild[63] = torch.linspace(-1, 1, 63), 50.0
    found = clipping.clip_blocks(torch.cat([mild, wild]), block_size=64, quant_type="nf4")
    assert found[63] < 1.1
    assert found[127] == 50.0


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
def test_values_that_fill_no_whole_block(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = clipping.clip_blocks(values, block_size=64, quant_type="nf4")
    assert found.shape == values.shape
    assert (found.abs() <= values.abs()).all()
    assert torch.equal(found.sign(), values.sign())


def test_weights_that_are_codes_already_stay_as_they_are() -> None:
    layer = quantized("nf4", layer=normal())
    again = quantized("nf4", layer=normal())
    plain = normal()
    plain.weight.data = layer.dequantize(torch.float32)
    assert same(codes_of(quantized("nf4", layer=plain, clip_search=True)), codes_of(again))


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_what_has_no_blocks_has_none_to_clip(form: str) -> None:
    with pytest.raises(ValueError, match=rf'clip_search is for 4-bit types, not for quant_type="{form}"'):
        QuantizationConfig(quant_type=form, clip_search=True)


def test_a_base_requantized_in_a_merge_is_searched_as_it_was() -> None:
    config = QuantizationConfig(clip_search=True)
    net = torch.nn.Sequential(normal())
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"]), quantization=config)
    before = codes_of(net)
    with torch.no_grad():
        net[0].adapters["default"].lora_B.normal_()  # type: ignore[index, operator, union-attr]
    merge_adapters(net, MergeConfig(base="requantized", tolerance=10.0))
    assert not same(codes_of(net), before)
    assert net[0].stored_as.clip_search


def test_a_file_from_before_the_search_loads_on_a_base_without_it_and_on_no_other(tmp_path: Path) -> None:
    def fit(resume: Any = None, **options: Any) -> pl.Trainer:
        callback = LoRACallback(LoRAConfig(rank=2), quantization=QuantizationConfig(**options), print_report=False)
        trainer = quiet_trainer(tmp_path, callback, epochs=1 if resume is None else 2)
        trainer.fit(Language("llama-wide"), token_loader(), token_loader(), ckpt_path=resume)
        return trainer

    fit().save_checkpoint(tmp_path / "now.ckpt")
    content = read(tmp_path / "now.ckpt")
    del content["lightning_lora"]["quantization"]["clip_search"]
    torch.save(content, tmp_path / "then.ckpt")
    fit(tmp_path / "then.ckpt")
    with pytest.raises(Exception, match="clip_search"):
        fit(tmp_path / "then.ckpt", clip_search=True)
