"""Triton's kernels compute what their definitions in torch's operations do, and draw one mask for all of them.

Without a GPU they run in Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET), in fp32 and fp16 alone: its
``tl.dot`` is wrong in bf16.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, MissingDependencyError, inject_adapters
from lightning_lora.fused import lead, lora_linear
from lightning_lora.fused.draw import draw_dropout
from lightning_lora.fused.dropout import MaskedDropout, Pull
from lightning_lora.fused.linear import Frozen, reference
from tests.fused.derivatives import gradients

pytest.importorskip("triton", reason="triton is not installed (it is for Linux alone)")
from lightning_lora.fused.kernels import KernelDropout
from lightning_lora.fused.products import Update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {})
SHAPES = [(70, 200, 5), (130, 128, 16), (1, 7, 3), (65, 129, 20)]


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found, expected, dtype):
    return (found.double() - expected.double()).norm() <= DTYPES[dtype] * expected.double().norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_each_kernel_computes_its_definition(dtype, shape):
    tokens, width, rank = shape
    drop = KernelDropout(0.3, seed=11)
    x, small_A = draw(tokens, width, seed=1, dtype=dtype), draw(rank, width, seed=2, dtype=dtype)
    inner, gathered = draw(tokens, rank, seed=3, dtype=dtype), draw(tokens, width, seed=4, dtype=dtype)
    mask = drop.mask(x.shape, x).keep(torch.ones_like(x)).float()
    assert close(drop.project(x, small_A), (x.float() * mask) @ small_A.float().T, dtype)
    grad_A, grad_input = drop.pull_back(Pull(Update(inner, small_A), x, gathered=gathered.clone()))
    assert grad_A.dtype == torch.float32
    assert close(grad_A, inner.float().T @ (x.float() * mask), dtype)
    added = (inner.float() @ small_A.float()) * mask
    assert close(grad_input, gathered.float() + added, dtype)
    assert close(drop.pull_back(Pull(Update(inner, small_A)))[1], added, dtype)


def test_a_mask_depends_on_the_seed_and_the_place_alone():
    like = torch.ones(200, 300, device=DEVICE)
    masks = [KernelDropout(0.5, seed).keep(like) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(KernelDropout(0.5, 1).keep(like[:70]), masks[0][:70])
    assert torch.equal(KernelDropout(0.5, 1).keep(like.half()).float(), masks[0])


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.9])
def test_the_share_that_was_asked_for_is_dropped_independently_of_the_neighbours(probability):
    ones = torch.ones(600, 256, device=DEVICE)
    drop = KernelDropout(probability, seed=3)
    kept = drop.keep(ones)
    error = 4 * (probability * (1 - probability) / kept.numel()) ** 0.5
    assert float(1 - kept.mean()) == pytest.approx(probability, abs=error)
    assert float(kept.mean()) * drop.scale == pytest.approx(1.0, abs=error * drop.scale)
    centred = (kept - kept.mean()).flatten()
    for lag in (1, 31, 32, 64, 128, 256):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(float(correlation)) < 0.02


def pieces(dtype=torch.float32, width=40, out=24, rank=4):
    lora_A, lora_B = (
        draw(*shape, seed=seed).requires_grad_() for seed, shape in ((2, (rank, width)), (3, (out, rank)))
    )
    return Frozen(draw(out, width, seed=1, dtype=dtype), draw(out, seed=4, dtype=dtype)), lora_A, lora_B


def test_a_layer_has_the_values_and_gradients_of_its_definition():
    frozen, lora_A, lora_B = pieces()
    x = draw(2, 9, 40, seed=5)
    torch.manual_seed(7)
    drop = draw_dropout(0.4, like=x, kernels="triton")
    assert isinstance(drop, KernelDropout)

    def fused(x):
        return lora_linear(x, frozen, lora_A, lora_B, scaling=1.5, dropout=0.4, kernels="triton")

    def joint(x):
        lora_As = [lora_A, lora_A.detach().clone().requires_grad_()]
        return lead(x, frozen, lora_As, lora_B, scalings=[1.5, 2.0], dropout=0.4, kernels="triton")[0]

    def recomputed(x):
        return checkpoint(fused, x, use_reentrant=False)

    expected = gradients(lambda x: reference(x, frozen, lora_A, lora_B, scaling=1.5, drop=drop), x, lora_A, lora_B)
    for function in (fused, joint, recomputed):
        found = gradients(function, x, lora_A, lora_B)
        for got, wanted in zip(found, expected):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, found, gradients(function, x, lora_A, lora_B)))


def test_second_derivatives_are_those_of_the_definition():
    frozen, lora_A, lora_B = pieces()
    leaf = draw(5, 40, seed=5).requires_grad_()
    torch.manual_seed(7)
    drop = draw_dropout(0.4, like=leaf, kernels="triton")

    def penalty(function):
        first = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (lora_A, lora_B))

    expected = penalty(lambda x: reference(x, frozen, lora_A, lora_B, scaling=1.5, drop=drop))
    torch.manual_seed(7)
    found = penalty(lambda x: lora_linear(x, frozen, lora_A, lora_B, scaling=1.5, dropout=0.4, kernels="triton"))
    for got, wanted in zip(found, expected):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_batch_of_no_tokens_passes():
    frozen, lora_A, lora_B = pieces()
    found = gradients(
        lambda x: lora_linear(x, frozen, lora_A, lora_B, scaling=1.0, dropout=0.4, kernels="triton"),
        draw(0, 40, seed=5), lora_A, lora_B,
    )  # fmt: skip
    assert [tuple(tensor.shape) for tensor in found[:2]] == [(0, 24), (0, 40)]
    assert not any(tensor.any() for tensor in found[2:])


def test_an_adapter_uses_them_where_they_act_and_torch_elsewhere(monkeypatch):
    net = nn.Sequential(nn.Linear(40, 24)).to(DEVICE)
    inject_adapters(net, LoRAConfig(rank=2, dropout=0.5, kernels="triton", target_modules="all-linear"))
    nn.init.normal_(net[0].adapters["default"].lora_B)
    launched = []
    monkeypatch.setattr(KernelDropout, "project", lambda *args: launched.append(1) or draw(9, 2, seed=1))
    net(draw(9, 40, seed=5))
    assert launched == [1]
    net.eval()(draw(9, 40, seed=5))
    net.double().train()(draw(9, 40, seed=5).double())
    assert launched == [1]
    assert isinstance(draw_dropout(0.5, like=draw(1, seed=1).double(), kernels="triton"), MaskedDropout)


def test_without_triton_the_message_says_what_to_do(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_lora.fused.kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match='kernels="torch"'):
        draw_dropout(0.5, like=draw(3, seed=1), kernels="triton")
