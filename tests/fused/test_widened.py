"""On a CPU without instructions for 16 bits, products are taken in fp32 and rounded once."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.fused import draw as draws
from lightning_lora.fused import widened
from lightning_lora.fused.draw import draw_dropout, fixed_seed
from lightning_lora.fused.linear import Frozen, lora_linear, reference
from lightning_lora.fused.products import TORCH, Update
from lightning_lora.fused.widened import WIDENED, is_emulated
from tests.fused.derivatives import gradients

DTYPES = [torch.bfloat16, torch.float16]
# tokens, in, out, rank
SHAPES = [(16, 8, 24, 1), (17, 40, 8, 3), (300, 33, 70, 16), (1000, 64, 900, 5)]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """As on a CPU without the instructions."""
    monkeypatch.setattr(draws, "is_emulated", lambda dtype: dtype in DTYPES)


@pytest.fixture(params=[2**22, 2**15], ids=["whole", "in blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(widened, "_BLOCK", request.param)
    monkeypatch.setattr(widened, "_LEAST", min(256, request.param // 1000))


def draw(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(found, exact):
    """Each element to a rounding of itself, and sums in fp32 to that of the largest."""
    rounding = torch.finfo(found.dtype).eps
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    return bool((error <= rounding * exact.abs() + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("blocks")
@torch.no_grad()
def test_each_product_is_that_of_its_definition_rounded_once(shape, dtype):
    tokens, width, out_width, rank = shape
    sizes = {
        "x": (tokens, width), "gradient": (tokens, out_width), "gathered": (tokens, width), "inner": (tokens, rank),
        "A": (rank, width), "B": (out_width, rank), "W": (out_width, width), "bias": (out_width,),
    }  # fmt: skip
    given = {name: draw(*size, seed=seed, dtype=dtype) for seed, (name, size) in enumerate(sizes.items())}
    x, gradient, gathered, inner, A, B, W, bias = given.values()
    xd, gd, gatheredd, innerd, Ad, Bd, Wd, biasd = (value.double() for value in given.values())

    hidden = WIDENED.project(x, A, 1.5)
    assert hidden.dtype == dtype and rounded(hidden, 1.5 * xd @ Ad.T)
    for start in (None, bias):
        out = torch.empty(tokens, out_width, dtype=dtype)
        WIDENED.output(x, W, start, hidden, B, out=out)
        assert rounded(out, xd @ Wd.T + hidden.double() @ Bd.T + (0 if start is None else biasd))
    found, grad_B = WIDENED.gradients_of_update(gradient, B, hidden=hidden, like=torch.empty(B.shape), to_hidden=True)
    assert rounded(found, gd @ Bd)
    assert grad_B.dtype == torch.float32 and rounded(grad_B, gd.T @ hidden.double())
    assert WIDENED.gradients_of_update(gradient, B, hidden=None, like=B, to_hidden=False) == (None, None)
    assert rounded(WIDENED.gradient_of_first(inner, x, 1.5), 1.5 * innerd.T @ xd)
    for start, begun in ((None, 0.0), (gathered, gatheredd)):
        for base, below in ((None, 0.0), ((gradient, W), gd @ Wd)):
            own = None if start is None else start.clone()
            gathered_too = WIDENED.gradient_of_input(own, base, Update(inner, A, 1.5))
            assert rounded(gathered_too, begun + below + 1.5 * innerd @ Ad)
            assert own is None or gathered_too is own
    assert rounded(WIDENED.gradient_of_input(None, (gradient, W)), gd @ Wd)
    assert WIDENED.gradient_of_input(gathered, None) is gathered
    # A weight whose columns lie one after the other, as Conv1D's.
    out = torch.empty(tokens, out_width, dtype=dtype)
    WIDENED.output(x, W.t().contiguous().t(), None, hidden, B, out=out)
    assert rounded(out, xd @ Wd.T + hidden.double() @ Bd.T)


def layer(dtype, *, bias=True):
    frozen = Frozen(draw(40, 24, seed=1, dtype=dtype), draw(40, seed=2, dtype=dtype) if bias else None)
    A, B = (draw(*shape, seed=3, dtype=torch.float32).requires_grad_() for shape in ((4, 24), (40, 4)))
    return frozen, A, B


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["as it is", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
def test_a_layer_has_the_values_and_gradients_of_its_definition(dropout, autocast, dtype):
    frozen, A, B = layer(dtype)
    x = draw(3, 21, 24, seed=5, dtype=dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = gradients(lambda x: lora_linear(x, frozen, A, B, scaling=1.5, dropout=dropout), x, A, B)
    torch.manual_seed(7)
    drop = draw_dropout(dropout, like=x)
    wide = Frozen(frozen.weight.double(), frozen.bias.double())
    A64, B64 = (tensor.detach().double().requires_grad_() for tensor in (A, B))
    expected = gradients(lambda x: reference(x, wide, A64, B64, scaling=1.5, drop=drop), x.double(), A64, B64)
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32, torch.float32]
    for got, wanted in zip(found, expected):
        assert float((got.double() - wanted).norm()) <= 0.01 * float(wanted.norm())


def test_a_plan_of_memory_is_the_same_on_every_cpu():
    with fixed_seed(0):
        assert draw_dropout(0.0, like=torch.ones(2, 32, dtype=torch.bfloat16)).products is TORCH


def test_it_acts_on_16_bits_on_a_cpu_alone():
    for dtype in (*DTYPES, torch.float32, torch.float64):
        narrow = dtype in DTYPES
        for dropout in (0.0, 0.05, 0.3):
            drop = draw_dropout(dropout, like=torch.ones(2, 32, dtype=dtype))
            assert drop.products is (WIDENED if narrow else TORCH)
        assert draw_dropout(0.0, like=torch.ones(2, 32, dtype=dtype, device="meta")).products is TORCH


@pytest.mark.parametrize("few", [0, 1, 15])
def test_few_rows_are_multiplied_as_torch_does(few):
    frozen, A, B = layer(torch.bfloat16)
    x = draw(few, 24, seed=5, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(WIDENED.project(x, A.bfloat16()), TORCH.project(x, A.bfloat16()))
        outputs = [torch.empty(few, 40, dtype=torch.bfloat16) for _ in range(2)]
        for products, out in zip((WIDENED, TORCH), outputs):
            products.output(x, frozen.weight, frozen.bias, x[:, :4], B.bfloat16(), out=out)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("size", [(0, 24), (40, 0)], ids=str)
def test_layers_without_outputs_or_inputs(size):
    A, B = torch.zeros(4, size[1], requires_grad=True), torch.zeros(size[0], 4, requires_grad=True)
    x = torch.ones(20, size[1], dtype=torch.bfloat16).requires_grad_()
    output = lora_linear(x, Frozen(torch.ones(size, dtype=torch.bfloat16), None), A, B, scaling=1.5)
    output.sum().backward()
    assert output.shape == (20, size[0]) and not output.any()
    assert [tensor.grad.shape for tensor in (x, A, B)] == [x.shape, A.shape, B.shape]


@pytest.mark.parametrize("bias", [True, False])
def test_before_the_first_step_outputs_are_the_bases_to_the_last_bit(bias):
    for width, out in ((64, 64), (512, 1376), (1376, 512)):
        linear = nn.Linear(width, out, bias=bias).bfloat16()
        x = draw(3, 13, width, seed=1, dtype=torch.bfloat16)
        expected = linear(x).detach()
        net = nn.Sequential(linear)
        inject_adapters(net, LoRAConfig(rank=4, dropout=0.1, target_modules=["0"]))
        assert torch.equal(net(x), expected)
        linear.adapter("default").lora_B.data[-1, -1] = 1.0
        assert not torch.equal(net(x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_layer_gives_the_same_gradients_to_the_last_bit(reentrant):
    frozen, A, B = layer(torch.bfloat16)
    x = draw(3, 21, 24, seed=5, dtype=torch.bfloat16)

    def run(x):
        return lora_linear(x, frozen, A, B, scaling=1.5, dropout=0.1)

    kept = gradients(run, x, A, B)
    again = gradients(lambda x: checkpoint(run, x, use_reentrant=reentrant), x, A, B)
    assert all(map(torch.equal, kept, again))


def test_products_whose_derivative_is_wanted_are_torchs():
    x, A = draw(20, 24, seed=5, dtype=torch.bfloat16), draw(3, 24, seed=6, dtype=torch.bfloat16)
    assert torch.equal(WIDENED.project(x, A), TORCH.project(x, A))
    update = Update(draw(20, 3, seed=7, dtype=torch.bfloat16), A)
    assert torch.equal(WIDENED.gradient_of_input(x, None, update), TORCH.gradient_of_input(x, None, update))


def test_second_derivatives_are_those_of_fp32():
    frozen, A, B = layer(torch.bfloat16, bias=False)

    def second(dtype):
        x = draw(20, 24, seed=5, dtype=torch.bfloat16).to(dtype).requires_grad_()
        base = Frozen(frozen.weight.to(dtype), None)
        (first,) = torch.autograd.grad(
            lora_linear(x, base, A, B, scaling=1.5).double().square().sum(), x, create_graph=True
        )
        (found,) = torch.autograd.grad(first.double().square().sum(), B)
        return found.double()

    assert float((second(torch.bfloat16) - second(torch.float32)).norm()) <= 0.02 * float(second(torch.float32).norm())


def test_what_is_copied_at_a_time_does_not_grow_with_the_matrices(monkeypatch):
    """A weight of a large model in fp32 would be twice the memory of the one there is."""
    monkeypatch.setattr(widened, "_BLOCK", 2**15)
    largest = []
    whole = torch.Tensor.addmm_

    def watch(total, left, right, **options):
        largest.append(max(tensor.untyped_storage().nbytes() for tensor in (total, left, right)))
        return whole(total, left, right, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", watch)
    dtype = torch.bfloat16
    with torch.no_grad():
        x, W, gradient = (draw(*size, seed=1, dtype=dtype) for size in ((1024, 128), (2048, 128), (1024, 2048)))
        A, B, hidden = (draw(*size, seed=2, dtype=dtype) for size in ((4, 128), (2048, 4), (1024, 4)))
        WIDENED.output(x, W, None, hidden, B, out=torch.empty(1024, 2048, dtype=dtype))
        WIDENED.gradient_of_input(None, (gradient[:, :128], W[:128]), Update(hidden, A))
        WIDENED.gradients_of_update(gradient[:, :128], B[:128], hidden=hidden, like=torch.empty(128, 4), to_hidden=True)
    assert len(largest) > 30 and max(largest) <= 256 * 256 * 4


@pytest.mark.parametrize(("machine", "supported", "expected"), [
    ("x86_64", False, True), ("AMD64", False, True), ("x86_64", True, False), ("aarch64", False, False),
])  # fmt: skip
def test_it_is_for_x86_whose_instructions_onednn_does_not_find(machine, supported, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    is_emulated.cache_clear()
    try:
        assert is_emulated(torch.bfloat16) is expected
        assert not is_emulated(torch.float32)
    finally:
        is_emulated.cache_clear()
