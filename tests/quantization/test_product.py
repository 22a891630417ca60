"""The product with a quantized weight: the values and gradients of the dequantized one, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, QuantizationError, inject_adapters
from tests.quantization.quantized import FORMATS, TOLERANCE, codes_of, dense, inputs, quantized
from tests.states import same

pytest.importorskip("bitsandbytes")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((8, 64), (5, 128), (1, 64))
ODD = (33, 5)  # no whole blocks; bitsandbytes compiles a fallback for each such shape, which takes seconds


def reference(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.dequantize(x.dtype), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_values_and_input_gradients_are_those_of_the_dequantized_weight(form: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        layer = quantized(form, *shape, dtype=dtype)
        x, y = inputs(6, shape[1], dtype=dtype), inputs(6, shape[1], dtype=dtype)
        output, expected = layer(x), reference(layer, y)
        weights = inputs(*output.shape, dtype=dtype, grad=False)
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMATS)
def test_a_shape_that_is_no_whole_blocks_computes_the_same(form: str) -> None:
    layer, x, y = quantized(form, *ODD), inputs(6, ODD[1]), inputs(6, ODD[1])
    output, expected = layer(x), reference(layer, y)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("form", FORMATS)
def test_the_weight_is_near_the_dense_one(form: str) -> None:
    layer, plain = quantized(form, 32, 128), dense(32, 128)
    error = (layer.dequantize(torch.float32) - plain.weight).norm() / plain.weight.norm()
    assert 0 < error < (0.01 if form == "int8" else 0.15)  # NF4 9 %, FP4 11 % of a normal weight


@pytest.mark.parametrize("form", FORMATS)
def test_a_wider_dtype_of_the_weight_is_the_same_weight(form: str) -> None:
    layer = quantized(form)
    single = layer.dequantize(torch.float32)
    torch.testing.assert_close(layer.dequantize(torch.float64), single.double(), rtol=1e-6, atol=0)
    assert torch.equal(layer.dequantize(torch.bfloat16), single.bfloat16())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_inputs_of_any_number_of_dimensions(form: str, shape: tuple[int, ...]) -> None:
    layer, x, y = quantized(form), inputs(*shape), inputs(*shape)
    output, expected = layer(x), reference(layer, y)
    output.sum().backward()
    expected.sum().backward()
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("form", FORMATS)
def test_a_transposed_input_and_a_transposed_weight(form: str) -> None:
    plain = dense(8, 64)
    plain.weight.data = plain.weight.data.t().contiguous().t()
    layer, x = quantized(form, layer=plain), inputs(64, 6, grad=False).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), reference(layer, x))
    assert torch.equal(layer.dequantize(torch.float32), quantized(form).dequantize(torch.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_kept_for_the_backward_but_what_the_adapter_needs(form: str) -> None:
    holder = nn.Sequential(dense())
    saved: list[Tensor] = []
    x = inputs(6, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        quantized(form)(x)
    assert saved == []
    holder[0] = quantized(form)
    inject_adapters(holder, LoRAConfig(rank=2))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        output = holder(x)
    assert saved
    assert max(tensor.numel() for tensor in saved) <= max(x.numel(), output.numel())  # 384 values; the weight has 512


@pytest.mark.parametrize("form", FORMATS)
def test_autocast_gives_its_dtype_as_for_a_dense_layer(form: str) -> None:
    layer, x = quantized(form), inputs(6, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        assert output.dtype == dense()(x).dtype == torch.bfloat16
        assert dense(dtype=torch.float64)(x.double()).dtype == torch.float64
        assert quantized(form, dtype=torch.float64)(x.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.linear(x, layer.dequantize(torch.float32), layer.bias)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    output.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMATS)
def test_the_compute_dtype_is_that_of_the_product_with_and_without_autocast(form: str) -> None:
    layer, x = quantized(form, compute_dtype="bfloat16"), inputs(6, 64, grad=False)
    rounded = F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16)) + layer.bias.bfloat16()
    assert torch.equal(layer(x), rounded.float())
    wide = quantized(form, compute_dtype="float32")
    expected = wide(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), rounded)
        assert torch.equal(wide(x), expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("compute_dtype", [None, "bfloat16", "float32"])
def test_nothing_of_the_layer_changes_in_any_forward(form: str, compute_dtype: str | None) -> None:
    layer = quantized(form, compute_dtype=compute_dtype)
    codes, bias, settings = codes_of(layer), layer.bias.detach().clone(), dict(vars(layer))
    for dtype in DTYPES:
        layer(inputs(3, 64, dtype=dtype)).float().sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            layer.eval()(inputs(3, 64))
        layer.train()
    assert same(codes_of(layer), codes)
    assert same(layer.bias.detach(), bias)
    assert vars(layer) == settings


@pytest.mark.parametrize("form", FORMATS)
def test_an_adapted_layer_keeps_no_dense_weight_from_one_pass_to_the_next(form: str) -> None:
    net = nn.Sequential(quantized(form))
    inject_adapters(net, LoRAConfig(rank=2, target_modules=["0"]))
    before = vars(net[0]).keys(), len(pickle.dumps(net))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            net(inputs(3, 64)).float().sum().backward()
        net.zero_grad(set_to_none=True)
    assert (vars(net[0]).keys(), len(pickle.dumps(net))) == before


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_computes_what_training_does_and_training_goes_on_after_it(form: str, dtype: torch.dtype) -> None:
    layer = quantized(form, 32, 64, dtype=dtype)
    x = inputs(6, 64, dtype=dtype, grad=False)
    before, codes = layer(x), codes_of(layer)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(layer.eval()(x), before)
    assert same(codes_of(layer), codes)
    y = x.clone().requires_grad_()
    output = layer.train()(y)
    output.float().sum().backward()
    assert torch.equal(output, before)
    expected = torch.ones(6, 32, dtype=dtype) @ layer.dequantize(dtype)
    torch.testing.assert_close(y.grad, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMATS)
def test_an_input_of_integers_is_refused_with_advice(form: str) -> None:
    layer = quantized(form)
    with pytest.raises(QuantizationError, match=r"input of torch\.uint8.*skip_modules"):
        layer(torch.zeros(2, 64, dtype=torch.uint8))


@pytest.mark.parametrize("form", FORMATS)
def test_first_and_second_derivatives_are_exact(form: str) -> None:
    layer, x = quantized(form, 3, 64, dtype=torch.float64), inputs(2, 64, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: layer(z).square(), (x,))
    assert torch.autograd.gradgradcheck(lambda z: layer(z).square(), (x,))


@pytest.mark.parametrize("form", FORMATS)
def test_functions_of_torch_func_go_through_it(form: str) -> None:
    layer, x = quantized(form), inputs(5, 64, grad=False)
    gradients = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x)
    y = x.clone().requires_grad_()
    reference(layer, y).square().sum().backward()
    torch.testing.assert_close(gradients, y.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, when it traces
@pytest.mark.parametrize("form", ["nf4-double", "int8", "bf16"])
def test_a_compiled_layer_computes_the_same(form: str) -> None:
    holder = nn.Sequential(quantized(form), nn.Tanh())
    inject_adapters(holder, LoRAConfig(rank=2))
    nn.init.ones_(holder[0].adapters["default"].lora_B)
    plain, x, y = copy.deepcopy(holder), inputs(6, 64), inputs(6, 64)
    torch._dynamo.reset()
    compiled = torch.compile(holder, backend="aot_eager")
    compiled(x).sum().backward()
    plain(y).sum().backward()
    torch.testing.assert_close(compiled(x), plain(y))
    torch.testing.assert_close(x.grad, y.grad)
    gradients = [[p.grad for p in module.parameters() if p.requires_grad] for module in (holder, plain)]
    assert len(gradients[0]) == 2
    torch.testing.assert_close(*gradients)
