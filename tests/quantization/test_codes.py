"""Codes and scales are those of bitsandbytes; what can't be stored is refused before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import QuantizationConfig, QuantizationError
from lightning_lora.quantization.config import STORAGE_DTYPES
from lightning_lora.quantization.conversion import quantize_layers
from lightning_lora.quantized_layer import QuantizedLayer
from tests.quantization.quantized import FORMATS, FOUR_BIT, STORAGES, codes_of, dense, equal_codes, inputs, quantized
from tests.states import same

bnb = pytest.importorskip("bitsandbytes")
four_bit = pytest.importorskip("lightning_lora.quantization.four_bit")

LARGE = (2100, 64)  # more than 2**17 values


def at_once(weight: torch.Tensor, options: dict[str, Any], block: int, storage: torch.dtype) -> Any:
    """What bitsandbytes makes of the whole weight."""
    return bnb.functional.quantize_4bit(
        weight,
        blocksize=block,
        compress_statistics=options.get("double_quant", False),
        quant_type=options["quant_type"],
        quant_storage=storage,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FOUR_BIT)
def test_codes_and_scales_are_those_of_the_whole_weight_in_one_go(form: str, dtype: torch.dtype) -> None:
    for out, inner in ((8, 64), LARGE):
        layer, plain = quantized(form, out, inner, dtype=dtype), dense(out, inner, dtype=dtype)
        codes, state = at_once(plain.weight.data, FORMATS[form], 64, torch.uint8)
        mine = layer.weight.quant_state
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(mine.absmax, state.absmax)
        assert (mine.nested, mine.quant_type, mine.shape) == (state.nested, state.quant_type, state.shape)
        if state.nested:
            assert torch.equal(mine.state2.absmax, state.state2.absmax)
            assert torch.equal(mine.offset, state.offset)
        assert torch.equal(layer.dequantize(dtype), bnb.functional.dequantize_4bit(codes, state))


def test_the_larger_weight_of_that_test_is_several_chunks_and_no_multiple_of_one() -> None:
    assert LARGE[0] * LARGE[1] > 3 * four_bit._CHUNK
    assert LARGE[0] * LARGE[1] % four_bit._CHUNK


@pytest.mark.parametrize("block", [32, 256, 4096])
def test_block_sizes_are_those_asked_for(block: int) -> None:
    layer = quantized("nf4", 40, 256, block_size=block)
    codes, state = at_once(dense(40, 256).weight.data, FORMATS["nf4"], block, torch.uint8)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    assert len(state.absmax) == -(-40 * 256 // block)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_floating_point_storage_holds_the_same_bytes(storage: str) -> None:
    layer, plain = quantized("nf4", 3, 64, storage_dtype=storage), quantized("nf4", 3, 64)
    assert layer.weight.dtype == STORAGE_DTYPES[storage]
    assert torch.equal(layer.weight.data.view(torch.uint8).view(-1), plain.weight.data.view(-1))
    assert torch.equal(layer.dequantize(torch.float32), plain.dequantize(torch.float32))


@pytest.mark.parametrize("storage", STORAGES)
def test_an_odd_number_of_values_is_stored_whole(storage: str) -> None:
    layer, plain = quantized("nf4", 33, 5, storage_dtype=storage), quantized("nf4", 33, 5)
    assert plain.weight.nbytes == 83
    assert layer.weight.nbytes == -(-83 // layer.weight.element_size()) * layer.weight.element_size()
    assert torch.equal(layer.dequantize(torch.float32), plain.dequantize(torch.float32))


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_quantizing_what_the_codes_stand_for_gives_the_same_weight(form: str) -> None:
    layer, again = quantized(form, 16, 128), quantized(form, 16, 128)
    again.requantize(layer.dequantize(torch.float32))
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize(torch.float32))  # FP4 has codes for 0 and -0
    again.requantize(dense(16, 128).weight.data)
    assert equal_codes(again, layer)


def test_8_bit_codes_are_rounded_to_the_nearest_in_fp32() -> None:
    weight, layer = dense(70, 40).weight.data, quantized("int8", 70, 40)
    scale = weight.abs().amax(1, keepdim=True)
    assert torch.equal(layer.weight.SCB, scale.squeeze(1))
    assert torch.equal(layer.weight.data, (weight * (127 / scale)).round().to(torch.int8))
    assert ((layer.dequantize(torch.float32) - weight).abs() <= scale / 254 * (1 + 1e-4)).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_constant_weight_is_stored_exactly(form: str, value: float) -> None:
    plain = dense()
    nn.init.constant_(plain.weight, value)
    layer = quantized(form, layer=plain)
    assert torch.equal(layer.dequantize(torch.float32), torch.full((8, 64), value))
    assert torch.equal(layer(torch.zeros(1, 64)), layer.bias[None])


def test_values_that_fp16_cannot_hold_survive_in_8_bits() -> None:
    plain = dense(2, 64, dtype=torch.bfloat16)
    plain.weight.data[0], plain.weight.data[1] = 1e6, 1e-12
    expected = plain.weight.data.float()
    found = quantized("int8", layer=plain).dequantize(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("-inf"), torch.bfloat16), (1e300, torch.float64)],
    ids=["nan", "infinite", "beyond fp32"],
)
def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_changes(
    form: str, value: float, dtype: torch.dtype
) -> None:
    module = nn.ModuleDict({"fine": dense(dtype=dtype), "broken": dense(dtype=dtype)})
    module["broken"].weight.data[3, 5] = value
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(QuantizationError, match=r"'broken' can't be quantized: .* not finite.*skip_modules"):
        quantize_layers(module, ["fine", "broken"], QuantizationConfig(**FORMATS[form]))
    assert [type(child) for child in module.children()] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_weight_without_values_is_refused_by_name() -> None:
    module = nn.ModuleDict({"empty": nn.Linear(64, 8, device="meta")})
    with pytest.raises(QuantizationError, match=r"'empty' can't be quantized: .*meta device"):
        quantize_layers(module, ["empty"], QuantizationConfig())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_cast_of_the_module_leaves_codes_alone_and_is_that_of_the_dense_weight(form: str, storage: str) -> None:
    options = {} if form == "int8" else {"storage_dtype": storage}
    holder = nn.Sequential(quantized(form, **options))
    codes, single = codes_of(holder), holder[0].dequantize(torch.float32)
    for cast, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to("cpu"), torch.float64),
        (lambda m: m.float(), torch.float32),
    ):
        cast(holder)
        assert same(codes_of(holder), codes)
        assert holder[0].dense_dtype == holder[0].bias.dtype == dtype
        assert torch.equal(holder[0].dequantize(torch.float32), single)
        output = holder(inputs(3, 64, dtype=dtype, grad=False))
        assert output.dtype == dtype
        assert torch.isfinite(output).all()


@pytest.mark.parametrize("form", FORMATS)
def test_the_printed_layer_says_how_it_is_stored(form: str) -> None:
    layer = quantized(form)
    assert isinstance(layer, QuantizedLayer)
    text = repr(layer)
    assert "in_features=64, out_features=8, bias=True" in text
    assert form.partition("-")[0] in text
    assert ("double" in text) == ("double" in form)


def test_the_dense_weight_asks_for_no_gradient_any_more() -> None:
    plain = dense()
    held = plain.weight  # as by an optimizer that was made before
    quantized("nf4", layer=plain)
    assert not held.requires_grad
    assert plain.bias.requires_grad
