"""The CPU's tiles compute what the definitions in torch's operations do, and draw one mask for all of them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRACallback, LoRAConfig, MissingDependencyError, inject_adapters
from lightning_lora.fused import compiled
from lightning_lora.fused import draw as draws
from lightning_lora.fused.amx import AmxDropout, AmxProducts, fit
from lightning_lora.fused.draw import draw_dropout, fixed_seed
from lightning_lora.fused.dropout import Pull, WithMask
from lightning_lora.fused.linear import Frozen, lora_linear, reference
from lightning_lora.fused.products import Update
from tests.fused.derivatives import gradients
from tests.fused.hardware import AMX, has_amx

# tokens, in, out, rank: whole tiles and parts of them; weights that are packed in several groups, or left to torch
SHAPES = [
    (40, 1056, 1024, 7),
    (70, 1056, 928, 5),
    (35, 64, 8224, 3),
    (1, 32, 32, 1),
    (31, 64, 96, 5),
    (128, 96, 32, 16),
    (300, 32, 160, 33),
    (259, 2080, 64, 48),
    (70, 64, 64, 130),
]
ROUNDING = 2.0**-8  # of bf16


def draw(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, *, tolerance=1.5 * ROUNDING):
    """Each element to a rounding of the largest; torch's sums are rounded twice."""
    assert found.shape == expected.shape
    return bool((found.double() - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@has_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_each_product_is_that_of_its_definition(shape, threads):
    tokens, width, out_width, rank = shape
    x, gradient, gathered = draw(tokens, width, seed=1), draw(tokens, out_width, seed=2), draw(tokens, width, seed=3)
    A, B, W = draw(rank, width, seed=4), draw(out_width, rank, seed=5), draw(out_width, width, seed=6)
    bias, like = draw(out_width, seed=7), torch.empty(out_width, rank)
    exact = {name: value.double() for name, value in locals().items() if isinstance(value, torch.Tensor)}
    xd, gd, Ad, Bd, Wd = (exact[name] for name in ("x", "gradient", "A", "B", "W"))

    hidden = AMX.project(x, A)
    assert close(hidden, xd @ Ad.T)
    # As a part of what several layers share, hidden has longer rows than its own.
    wide = torch.cat([draw(tokens, 3, seed=8), hidden], dim=1)[:, 3:]
    inner, grad_B = AMX.gradients_of_update(gradient, B, hidden=wide, like=like, to_hidden=True)
    assert close(inner, gd @ Bd) and close(grad_B, gd.T @ hidden.double(), tolerance=1e-5)
    assert grad_B.dtype == torch.float32
    assert AMX.gradients_of_update(gradient, B, hidden=None, like=like, to_hidden=True)[1] is None
    only_B = AMX.gradients_of_update(gradient, B, hidden=hidden, like=like, to_hidden=False)
    assert only_B[0] is None and torch.equal(only_B[1], grad_B)
    assert close(AMX.gradient_of_first(inner, x, 1.5), 1.5 * inner.double().T @ xd, tolerance=1e-5)
    for given in (None, bias):
        out = torch.empty(tokens, out_width, dtype=torch.bfloat16)
        AMX.output(x, W, given, wide, B, out=out)
        assert close(out, xd @ Wd.T + hidden.double() @ Bd.T + (0 if given is None else exact["bias"]))
    # A weight whose columns lie one after the other, as Conv1D's.
    turned = W.t().contiguous().t()
    out = torch.empty(tokens, out_width, dtype=torch.bfloat16)
    AMX.output(x, turned, None, hidden, B, out=out)
    assert close(out, xd @ Wd.T + hidden.double() @ Bd.T)
    assert close(AMX.gradient_of_input(None, (gradient, turned), Update(inner, A)), (gd @ Wd) + inner.double() @ Ad)
    frozen, update = gd @ Wd, inner.double() @ Ad
    for start, before in ((None, 0.0), (gathered, exact["gathered"])):
        begun = [None if start is None else start.clone() for _ in range(3)]
        assert close(AMX.gradient_of_input(begun[0], (gradient, W), Update(inner, A)), before + frozen + update)
        assert close(AMX.gradient_of_input(begun[1], (gradient, W)), before + frozen)
        assert close(AMX.gradient_of_input(begun[2], None, Update(inner, A)), before + update)
    assert AMX.gradient_of_input(gathered, None) is gathered


@has_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_all_products_drop_by_the_mask(shape, threads):
    tokens, width, out_width, rank = shape
    drop = AmxDropout(AmxDropout.threshold_of(0.3), seed=11, products=AMX)
    x, small_A, inner = draw(tokens, width, seed=1), draw(rank, width, seed=2), draw(tokens, rank, seed=3)
    gathered, base = draw(tokens, width, seed=4), (draw(tokens, out_width, seed=5), draw(out_width, width, seed=6))
    mask = drop.keep(torch.ones(tokens, width)).double()
    assert 0.0 < float(mask.mean()) < 1.0 and torch.equal(drop.keep(x).double(), x.double() * mask)
    assert close(drop.project(x, small_A), (x.double() * mask) @ small_A.double().T)
    added = (inner.double() @ small_A.double()) * mask
    for given in (None, gathered):
        for below in (None, base):
            begun = None if given is None else given.clone()
            pull = Pull(Update(inner, small_A), x, factor_A=2.5, gathered=begun, base=below)
            grad_A, grad_input = drop.pull_back(pull)
            assert close(grad_A, 2.5 * inner.double().T @ (x.double() * mask), tolerance=1e-5)
            expected = added + (0 if given is None else given.double())
            assert close(grad_input, expected + (0 if below is None else base[0].double() @ base[1].double()))
    assert drop.pull_back(Pull(Update(inner, small_A), to_input=False)) == (None, None)
    assert not drop.project(torch.full_like(x, float("nan")), small_A).isfinite().any()


@has_amx
def test_a_mask_depends_on_the_seed_and_the_place_alone():
    like = torch.ones(200, 320)
    masks = [AmxDropout(2**15, seed, AMX).keep(like) for seed in (1, 1, 2, 2**31 - 1)]
    assert torch.equal(masks[0], masks[1])
    assert all(not torch.equal(masks[0], other) for other in masks[2:])
    assert torch.equal(AmxDropout(2**15, 1, AMX).keep(like[:70, :64]), masks[0][:70, :64])
    assert torch.equal(AmxDropout(2**15, 1, AMX).keep(like.bfloat16()).float(), masks[0])


@has_amx
@pytest.mark.parametrize("probability", [0.0001, 0.05, 0.5, 0.9, 0.99999])
def test_the_share_that_was_asked_for_is_dropped_independently_of_the_neighbours(probability):
    drop = draw_dropout(probability, like=torch.ones(1, 64, dtype=torch.bfloat16), kernels="amx")
    assert isinstance(drop, AmxDropout)
    kept = torch.cat([AmxDropout(drop._mask[1], seed, AMX).keep(torch.ones(600, 256)) for seed in range(8)])
    share = 1 - 1 / drop.scale
    assert share == pytest.approx(probability, abs=2**-17 + 1e-5 * (probability > 0.9))
    assert float(1 - kept.mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / kept.numel()) ** 0.5)
    centred = (kept - kept.mean()).flatten()
    for lag in (1, 7, 8, 16, 32, 64, 256, 600 * 256):  # elements, blocks, words, rows, seeds
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(float(correlation)) < 0.01
    rows, columns = kept.double().mean(1), kept.double().mean(0)
    for means, count in ((rows, 256), (columns, len(kept))):
        assert float(means.var()) == pytest.approx(share * (1 - share) / count, rel=0.4)


def pieces(width=64, out=96, rank=5, *, bias=True):
    lora_A, lora_B = (
        draw(*shape, seed=seed, dtype=torch.float32).requires_grad_()
        for seed, shape in ((2, (rank, width)), (3, (out, rank)))
    )
    return Frozen(draw(out, width, seed=1), draw(out, seed=4) if bias else None), lora_A, lora_B


@has_amx
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.4])
def test_a_layer_has_the_values_and_gradients_of_its_definition(dropout, bias):
    frozen, lora_A, lora_B = pieces(bias=bias)
    x = draw(2, 37, 64, seed=5)
    torch.manual_seed(7)
    drop = draw_dropout(dropout, like=x, kernels="amx")
    assert isinstance(drop.products, AmxProducts)

    def fused(x):
        return lora_linear(x, frozen, lora_A, lora_B, scaling=1.5, dropout=dropout, kernels="amx")

    def recomputed(x):
        return checkpoint(fused, x, use_reentrant=False)

    def in_another_order(x):
        return fused(x.transpose(0, 1)).transpose(0, 1)

    wide = Frozen(frozen.weight.double(), None if frozen.bias is None else frozen.bias.double())
    A64, B64 = (tensor.detach().double().requires_grad_() for tensor in (lora_A, lora_B))
    expected = gradients(lambda x: reference(x, wide, A64, B64, scaling=1.5, drop=drop), x.double(), A64, B64)
    for function in (fused, recomputed):
        found = gradients(function, x, lora_A, lora_B)
        for got, wanted in zip(found, expected):
            assert close(got, wanted, tolerance=4 * ROUNDING)
        assert all(map(torch.equal, found, gradients(function, x, lora_A, lora_B)))
    if not dropout:
        for got, wanted in zip(gradients(in_another_order, x, lora_A, lora_B), expected):
            assert close(got, wanted, tolerance=4 * ROUNDING)
        x = x.requires_grad_()
        fused(x).sum().backward()  # a gradient with strides of zero
        assert close(x.grad, (wide.weight + 1.5 * B64 @ A64).sum(0).expand_as(x).detach(), tolerance=4 * ROUNDING)


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.odd = nn.Linear(width, 40)
        self.back = nn.Linear(40, width, bias=False)

    def forward(self, x):
        return self.back(torch.tanh(self.odd(torch.tanh(self.q(x) * self.k(x) + self.v(x))))) + x


def block(kernels, *, dropout=0.0, dtype=torch.bfloat16):
    torch.manual_seed(0)
    made = nn.Sequential(Block(), Block()).to(dtype)
    names = ["q", "k", "v", "odd", "back"]
    inject_adapters(made, LoRAConfig(rank=6, dropout=dropout, kernels=kernels, target_modules=names))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return made


def grads(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(3)
    output = module(x)
    (output.float() ** 2).mean().backward()
    return [output.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@has_amx
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
def test_layers_with_one_input_and_layers_that_tiles_do_not_fit_agree_with_torchs_products(precision):
    x = draw(3, 21, 64, seed=1, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        found, expected = (grads(block(kernels, dtype=x.dtype), x) for kernels in ("amx", "torch"))
    assert len(found) == len(expected) == 22
    for got, wanted in zip(found, expected):
        assert got.dtype == wanted.dtype
        assert float((got.double() - wanted.double()).norm()) <= 0.02 * float(wanted.double().norm())


@has_amx
@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_layers_with_one_input_drop_what_the_mask_of_a_layer_alone_drops(dropout, monkeypatch):
    x = draw(3, 21, 64, seed=1)
    with monkeypatch.context() as plainly:
        plainly.setattr(AmxDropout, "project", WithMask.project)
        plainly.setattr(AmxDropout, "pull_back", WithMask.pull_back)
        expected = grads(block("amx", dropout=dropout), x)
    for got, wanted in zip(grads(block("amx", dropout=dropout), x), expected):
        assert got.dtype == wanted.dtype
        assert float((got.double() - wanted.double()).norm()) <= 0.02 * float(wanted.double().norm())


@has_amx
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("wrong", ["input", "lora_A", "lora_B", "weight", "bias"])
def test_shapes_that_are_no_product_are_refused_by_torch(wrong, dropout):
    frozen, lora_A, lora_B = pieces()
    x = draw(3, 96 if wrong == "input" else 64, seed=5)
    if wrong == "lora_A":
        lora_A = draw(5, 32, seed=2, dtype=torch.float32)
    if wrong == "lora_B":
        lora_B = draw(64, 5, seed=3, dtype=torch.float32)
    if wrong == "weight":
        frozen = Frozen(draw(96, 32, seed=1), frozen.bias)
    if wrong == "bias":
        frozen = Frozen(frozen.weight, draw(64, seed=1))
    with pytest.raises(RuntimeError, match=r"shape|size"):
        lora_linear(x, frozen, lora_A, lora_B, scaling=1.5, dropout=dropout, kernels="amx")


@has_amx
@torch.no_grad()
def test_gradients_of_other_shapes_are_refused_by_torch():
    x, A, B, W = draw(40, 64, seed=1), draw(5, 64, seed=2), draw(96, 5, seed=3), draw(96, 64, seed=4)
    hidden, gradient, like = draw(40, 5, seed=5), draw(40, 96, seed=6), torch.empty(96, 5)
    for call in (
        lambda: AMX.project(x, A[:, :32]),
        lambda: AMX.gradient_of_first(hidden[:9], x),
        lambda: AMX.gradients_of_update(gradient[:, :64], B, hidden=hidden, like=like, to_hidden=True),
        lambda: AMX.gradients_of_update(gradient, B, hidden=hidden[:9], like=like, to_hidden=True),
        lambda: AMX.gradient_of_input(None, (gradient[:, :64], W)),
        lambda: AMX.gradient_of_input(x, (gradient[:9], W)),
        lambda: AMX.gradient_of_input(None, (gradient, W), Update(hidden, A[:, :32])),
        lambda: AMX.gradient_of_input(None, (gradient, W), Update(hidden[:9], A)),
        lambda: AMX.gradient_of_input(None, None, Update(hidden, A[:4])),
        lambda: AMX.gradient_of_input(x, None, Update(hidden, A[:, :32])),
    ):
        with pytest.raises(RuntimeError, match=r"shape|size"):
            call()


@has_amx
def test_a_weight_that_is_elsewhere_is_left_to_torch():
    frozen, lora_A, lora_B = pieces()
    elsewhere = Frozen(frozen.weight.to("meta"), None)
    lora_linear(draw(3, 64, seed=5), elsewhere, lora_A, lora_B, scaling=1.5, kernels="amx")


@has_amx
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_fp32_and_a_second_derivative_are_torchs(dropout):
    x = draw(3, 21, 64, seed=1, dtype=torch.float32)
    for got, wanted in zip(*(grads(block(kernels, dropout=dropout, dtype=x.dtype), x) for kernels in ("amx", "torch"))):
        assert torch.equal(got, wanted)
    frozen, lora_A, lora_B = pieces(bias=False)
    x = draw(9, 64, seed=5).requires_grad_()
    torch.manual_seed(7)
    output = lora_linear(x, frozen, lora_A, lora_B, scaling=1.5, dropout=dropout, kernels="amx")
    (first,) = torch.autograd.grad((output.float() ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first.float() ** 2).sum(), lora_B)

    torch.manual_seed(7)
    drop = draw_dropout(dropout, like=x, kernels="amx")
    inputs = x.detach().double().requires_grad_()
    wide = Frozen(frozen.weight.double(), None)
    A64, B64 = (tensor.detach().double().requires_grad_() for tensor in (lora_A, lora_B))
    output = reference(inputs, wide, A64, B64, scaling=1.5, drop=drop)
    (first,) = torch.autograd.grad((output**2).sum(), inputs, create_graph=True)
    (expected,) = torch.autograd.grad((first**2).sum(), B64)
    assert float((second.double() - expected).norm()) <= 0.02 * float(expected.norm())


@has_amx
@pytest.mark.parametrize("bias", [True, False])
def test_before_the_first_step_outputs_are_the_bases_to_the_last_bit(bias):
    for width, out in ((64, 64), (512, 1376), (1376, 512), (2048, 96)):
        layer = nn.Linear(width, out, bias=bias).bfloat16()
        x = draw(3, 130, width, seed=1)
        expected = layer(x).detach()
        net = nn.Sequential(layer)
        inject_adapters(net, LoRAConfig(rank=4, dropout=0.1, kernels="amx", target_modules=["0"]))
        assert torch.equal(net(x), expected)
        layer.adapter("default").lora_B.data[-1, -1] = 1.0
        assert not torch.equal(net(x), expected)


@has_amx
def test_a_small_update_survives_the_rounding_of_a_bf16_output():
    weight = draw(512, 512, seed=1)
    lora_A, lora_B = (draw(*shape, seed=2, dtype=torch.float32) for shape in ((8, 512), (512, 8)))
    x = draw(64, 512, seed=3)
    scaling = 1e-3 * float(weight.float().norm() / (lora_B @ lora_A).norm())

    def update(scaling):
        return lora_linear(x, Frozen(weight, None), lora_A, lora_B, scaling=scaling, kernels="amx").double()

    exact = scaling * x.double() @ (lora_B @ lora_A).double().T
    found = update(scaling) - x.double() @ weight.double().T
    assert float((found * exact).sum() / exact.square().sum()) == pytest.approx(1.0, abs=0.1)


@has_amx
@torch.no_grad()
def test_threads_that_call_at_once_do_not_disturb_each_other():
    xs = [draw(200, 128, seed=seed) for seed in range(4)]
    A, weight, B = draw(16, 128, seed=9), draw(256, 128, seed=8), draw(256, 16, seed=7)
    right, like = [], torch.empty(256, 16)

    @torch.no_grad()  # of this thread
    def run(x):
        assert fit(x, A, weight)
        exact = x.double() @ weight.double().T + AMX.project(x, A).double() @ B.double().T
        out = torch.empty(200, 256, dtype=torch.bfloat16)
        for _ in range(50):
            hidden = AMX.project(x, A)
            AMX.output(x, weight, None, hidden, B, out=out)
            _, grad_B = AMX.gradients_of_update(out, B, hidden=hidden, like=like, to_hidden=True)
            right.append(close(out, exact) and close(grad_B, out.double().T @ hidden.double(), tolerance=1e-5))
            torch.mm(x, weight.T)  # oneDNN sets tiles of its own

    workers = [threading.Thread(target=run, args=(x,)) for x in xs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(right) == 200 and all(right)


def test_a_run_without_values_asks_for_no_kernels(monkeypatch):
    monkeypatch.setattr(draws, "find_amx", lambda: pytest.fail("asked for"))
    with fixed_seed(1):
        draw_dropout(0.5, like=torch.ones(2, 32, dtype=torch.bfloat16), kernels="amx")
    draw_dropout(0.0, like=torch.ones(2, 32, dtype=torch.bfloat16, device="meta"), kernels="amx")


@has_amx
def test_tensors_without_values_are_left_to_torch():
    with FakeTensorMode():
        lora_A, lora_B = torch.empty(4, 64), torch.empty(96, 4)
        frozen = Frozen(torch.empty(96, 64, dtype=torch.bfloat16), None)
        x = torch.empty(3, 64, dtype=torch.bfloat16).requires_grad_()
        output = lora_linear(x, frozen, lora_A, lora_B, scaling=1.5, kernels="amx")
        output.sum().backward()
        assert output.shape == (3, 96) and x.grad.shape == (3, 64)


def test_without_amx_the_products_are_torchs(monkeypatch):
    monkeypatch.setattr(draws, "find_amx", lambda: None)
    x = draw(3, 21, 64, seed=1)
    for dropout in (0.0, 0.05):
        found, expected = (grads(block(kernels, dropout=dropout), x) for kernels in ("amx", "torch"))
        assert all(map(torch.equal, found, expected))


@has_amx
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_goes_on_bit_for_bit(dropout, tmp_path):
    def fit(epochs, **options):
        seed_everything(1)
        module = copy.deepcopy(module_of_blocks())
        config = LoRAConfig(rank=4, dropout=dropout, kernels="amx", target_modules=["q", "k", "v", "odd"])
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision="bf16-true",
            default_root_dir=tmp_path,
            callbacks=[LoRACallback(config)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(), **options)
        if options:
            return module
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(2)
    fit(1)
    resumed = fit(2, ckpt_path=tmp_path / "1.ckpt")
    for (name, wanted), (_, found) in zip(whole.named_parameters(), resumed.named_parameters()):
        assert torch.equal(found, wanted), name


def module_of_blocks():
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(Block(), Block())

        def training_step(self, batch, _):
            return (self.net(batch[0].to(self.net[0].q.weight.dtype)).float() - batch[1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Module()


def loader():
    x, y = draw(24, 64, seed=1, dtype=torch.float32), draw(24, 64, seed=2, dtype=torch.float32)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


SOURCE = 'extern "C" int answer() { return 42; }\n'


def source_in(folder, text=SOURCE):
    path = Path(folder, "small.cpp")
    path.write_text(text)
    return path


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_file_is_compiled_once_and_again_when_it_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++ -DUNUSED")
    for _ in range(2):
        assert compiled.load_compiled(source_in(tmp_path), ["-O1"]).answer() == 42
    cache = tmp_path / "cache" / "lightning_lora"
    (first,) = cache.iterdir()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    compiled.load_compiled(source_in(tmp_path), ["-O1"])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    changed = source_in(tmp_path, SOURCE.replace("42", "43"))
    assert compiled.load_compiled(changed, ["-O1"]).answer() == 43
    assert first in cache.iterdir() and len(list(cache.iterdir())) == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_a_killed_compilation_leaves_is_never_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    deadly, armed = tmp_path / "deadly", tmp_path / "armed"
    kill = f'if [ -e {armed} ]; then case "$*" in *-shared*) echo torn > "${{@: -1}}"; kill -9 $PPID;; esac; fi'
    deadly.write_text(f'#!/bin/bash\n{kill}\nexec g++ "$@"\n')
    deadly.chmod(0o755)
    armed.touch()
    monkeypatch.setenv("CXX", str(deadly))
    script = (
        "from pathlib import Path\nfrom lightning_lora.fused.compiled import load_compiled\n"
        f"load_compiled(Path({str(source_in(tmp_path))!r}), ['-O1'])"
    )
    killed = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False)
    assert killed.returncode == -9
    armed.unlink()
    assert compiled.load_compiled(source_in(tmp_path), ["-O1"]).answer() == 42


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("how", ["no home", "a file in its place", "others may write to it"])
def test_without_a_folder_of_the_users_own_it_is_compiled_for_the_process(how, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "" if how == "no home" else str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiled.Path, "home", no_home)
    if how == "a file in its place":
        (tmp_path / "cache").touch()
    if how == "others may write to it":
        (tmp_path / "cache" / "lightning_lora").mkdir(parents=True)
        (tmp_path / "cache" / "lightning_lora").chmod(0o777)
    assert compiled.load_compiled(source_in(tmp_path), ["-O1"]).answer() == 42
    assert not list((tmp_path / "temporary").iterdir())
    assert not list(tmp_path.glob("cache/lightning_lora/*"))


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependencyError, match=r"no C\+\+ compiler was found. Install g\+\+"):
        compiled.load_compiled(source_in(tmp_path), [])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_a_compiler_can_not_compile_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependencyError, match=r"(?s)failed:.*nonsense"):
        compiled.load_compiled(source_in(tmp_path, "nonsense\n"), [])
    assert list((tmp_path / "cache" / "lightning_lora").iterdir()) == []


@has_amx
def test_layers_get_their_kernels_when_they_get_their_adapters(monkeypatch):
    def refuse():
        raise MissingDependencyError("no compiler")

    monkeypatch.setattr(draws, "find_amx", refuse)
    with pytest.raises(MissingDependencyError, match="no compiler"):
        block("amx")
    block("torch")
    inject_adapters(Block().to("meta"), LoRAConfig(rank=6, kernels="amx", target_modules=["q"]))
