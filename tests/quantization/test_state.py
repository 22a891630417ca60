"""State dicts, copies and files of quantized layers: the same codes and scales come back, or an error."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters, remove_adapters
from lightning_lora.quantized_layer import QuantizedLayer
from tests.quantization.quantized import FORMATS, FOUR_BIT, STORAGES, dense, equal_codes, inputs, quantized
from tests.states import same

bnb = pytest.importorskip("bitsandbytes")


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def other(form: str, **options: Any) -> nn.Linear:
    """A layer of the same format with other codes."""
    plain = dense(**{key: options.pop(key) for key in ("dtype",) if key in options})
    plain.weight.data = plain.weight.data.flip(0) * 1.5
    return quantized(form, layer=plain, **options)


@pytest.mark.parametrize("keep_vars", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_a_state_dict_comes_back_bit_by_bit_and_strictly(form: str, keep_vars: bool) -> None:
    layer, twin = nn.Sequential(quantized(form)), nn.Sequential(other(form))
    assert not equal_codes(layer, twin)
    state = layer.state_dict(keep_vars=keep_vars)
    twin.load_state_dict(state, strict=True)
    assert equal_codes(layer, twin)
    assert torch.equal(layer(inputs(3, 64)), twin(inputs(3, 64)))
    assert not twin[0].weight.requires_grad
    twin[0].weight.data.zero_()
    assert not equal_codes(layer, twin), "the codes were shared, not copied"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_a_state_dict_comes_back_through_a_file_that_opens_safely(form: str, assign: bool) -> None:
    layer, twin = nn.Sequential(quantized(form)), nn.Sequential(other(form))
    twin.load_state_dict(through_a_file(layer.state_dict()), strict=True, assign=assign)
    assert equal_codes(layer, twin)
    assert same(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("storage", STORAGES)
def test_codes_in_any_storage_load_into_a_layer_of_any_storage(storage: str) -> None:
    for loaded in STORAGES:
        layer, twin = quantized("nf4", 3, 64, storage_dtype=storage), quantized("nf4", 3, 64, storage_dtype=loaded)
        twin.requantize(torch.zeros(3, 64))
        own = twin.weight.dtype
        twin.load_state_dict(layer.state_dict())
        assert twin.weight.dtype == own
        assert torch.equal(twin.dequantize(torch.float32), layer.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_dense_weight_is_quantized_as_it_is_loaded(form: str, dtype: torch.dtype) -> None:
    late, early = other(form, dtype=dtype), dense(dtype=dtype)
    late.load_state_dict(dense().state_dict(), strict=True)
    early.load_state_dict(dense().state_dict(), strict=True)
    assert equal_codes(late, quantized(form, layer=early))
    assert torch.equal(late.bias, early.bias)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_missing_or_unexpected_is_still_named(form: str) -> None:
    layer = nn.Sequential(quantized(form))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
        layer.load_state_dict({"0.bias": state["0.bias"]})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.other"'):
        layer.load_state_dict({**state, "0.other": torch.zeros(1)})
    found = layer.load_state_dict({"0.bias": state["0.bias"]}, strict=False)
    assert found.missing_keys == ["0.weight"]


def wrong(form: str) -> dict[str, dict[str, Tensor]]:
    """States that do not fit an 8 x 64 layer of this format, by what is wrong with them."""
    state = quantized(form).state_dict()
    cases = {
        "dense of another shape": {**dense(8, 128).state_dict()},
        "codes of another shape": quantized(form, 8, 128).state_dict(),
        "codes cut off": {**state, "weight": state["weight"][:4]},
        "not finite": {**dense().state_dict(), "weight": torch.full((8, 64), float("nan"))},
    }
    if form == "bf16":
        return {**cases, "another format": quantized("int8").state_dict(), "4 bits": quantized("nf4").state_dict()}
    constants = "SCB" if form == "int8" else "weight.absmax"
    cases |= {
        "constants cut off": {**state, constants: state[constants][:2]},
        "integers without constants": {key: state[key] for key in ("weight", "bias")},
    }
    if form == "int8":
        return {**cases, "another format": quantized("nf4").state_dict()}
    twin = form.removesuffix("-double") if form.endswith("-double") else f"{form}-double"
    return {
        **cases,
        "another format": quantized("int8").state_dict(),
        "the other 4-bit type": quantized({"n": "fp4", "f": "nf4"}[form[0]]).state_dict(),
        "the other kind of constants": quantized(twin).state_dict(),
        "other blocks": quantized(form, block_size=128).state_dict(),
        "codes too long": {**state, "weight": torch.cat([state["weight"]] * 2)},
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_codes_that_do_not_fit_are_refused_and_the_layer_keeps_its_own(form: str, strict: bool) -> None:
    for what, state in wrong(form).items():
        layer = quantized(form)
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict") as caught:
            layer.load_state_dict({**state, "bias": layer.bias}, strict=strict)
        assert "weight: " in str(caught.value), what
        assert equal_codes(layer, quantized(form)), what


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m)))],
    ids=["deepcopy", "pickle", "deepcopy of a pickle"],
)
@pytest.mark.parametrize("form", FORMATS)
def test_copies_compute_the_same_and_share_nothing(form: str, copied: Any) -> None:
    holder = nn.Sequential(quantized(form))
    inject_adapters(holder, LoRAConfig(rank=2))
    nn.init.ones_(holder[0].adapters["default"].lora_B)
    twin, x = copied(holder), inputs(3, 64)
    assert type(twin[0]) is type(holder[0])
    assert type(twin[0].weight) is type(holder[0].weight)
    assert equal_codes(holder, twin)
    assert torch.equal(holder(x), twin(x))
    holder[0].requantize(torch.zeros(8, 64))
    assert not torch.equal(holder(x), twin(x))
    twin.to(torch.bfloat16)
    assert twin.load_state_dict(twin.state_dict()).missing_keys == []


@pytest.mark.parametrize("form", FORMATS)
def test_a_saved_module_opens_with_its_codes(form: str) -> None:
    holder, buffer = nn.Sequential(quantized(form)), io.BytesIO()
    torch.save(holder, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert equal_codes(holder, twin)
    assert torch.equal(holder(inputs(3, 64)), twin(inputs(3, 64)))


@pytest.mark.parametrize("form", FORMATS)
def test_without_its_adapters_a_layer_is_a_quantized_one_that_works(form: str) -> None:
    holder = nn.Sequential(dense(), nn.ReLU(), dense(2, 8))
    inject_adapters(holder, LoRAConfig(rank=2), quantization=QuantizationConfig(**FORMATS[form]))
    base = holder(inputs(3, 64))
    nn.init.ones_(holder[0].adapters["default"].lora_B)
    assert not torch.equal(holder(inputs(3, 64)), base)
    remove_adapters(holder)
    assert type(holder[0]) is type(quantized(form))
    assert torch.equal(holder(inputs(3, 64)), base)
    assert not [key for key in holder.state_dict() if "adapters" in key]
    frozen = [name for name, parameter in holder.named_parameters() if not parameter.requires_grad]
    assert frozen == ["0.weight", "2.weight"]  # codes take no gradient


@pytest.mark.parametrize("form", FOUR_BIT)
def test_a_state_dict_builds_a_weight_of_bitsandbytes_and_comes_back_from_its_layer(form: str) -> None:
    layer, x = quantized(form), inputs(3, 64)
    state = layer.state_dict()
    constants = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    theirs = bnb.nn.Linear4bit(64, 8, quant_type=form[:3], compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], constants, device="cpu", module=theirs)
    theirs.bias = layer.bias
    torch.testing.assert_close(theirs.train()(x), layer(x))
    back = other(form)
    back.load_state_dict(theirs.state_dict())
    assert equal_codes(back, layer)


def test_8_bit_codes_go_into_a_layer_of_bitsandbytes_and_back() -> None:
    layer = quantized("int8")
    theirs = bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")
    state = layer.state_dict()
    theirs.load_state_dict({**state, "weight": state["weight"].view(8, 64)})
    assert torch.equal(theirs.weight.data, layer.weight.data)
    back = other("int8")
    back.load_state_dict(theirs.state_dict())
    assert equal_codes(back, layer)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "bf16"])  # whose codes are the weight
def test_codes_are_never_taken_for_the_weight_of_a_dense_layer(form: str) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(64, 8).load_state_dict(quantized(form).state_dict(), strict=False)


@pytest.mark.parametrize("form", FORMATS)
def test_a_module_is_emptied_and_moved_as_any_other(form: str) -> None:
    holder = nn.Sequential(quantized(form))
    holder.share_memory()
    assert isinstance(holder[0], QuantizedLayer)
    holder.zero_grad()
    holder.train().eval().cpu()
    assert equal_codes(holder, nn.Sequential(quantized(form)))
