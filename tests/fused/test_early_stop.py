"""A recomputation ends where all that the backward needs is there: the last layer's product is not computed again."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters

WIDTH, HIDDEN, TOKENS = 64, 128, 96


class Block(nn.Module):
    """Up, a nonlinearity and down, around which the input is passed on."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Normed(Block):
    """The same with a norm at the end, which needs the output of the last layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(super().forward(x))


class Products(TorchDispatchMode):
    """Counts the matrix products as large as those with a base weight."""

    def __init__(self):
        super().__init__()
        self.large = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            rows, inner = factors[-2].shape
            self.large += rows * inner * factors[-1].shape[1] == TOKENS * WIDTH * HIDDEN
        return function(*args, **(kwargs or {}))


def net(kind=Block, dropout=0.0, quantization=None, depth=2):
    torch.manual_seed(0)
    made = nn.Sequential(*(kind() for _ in range(depth)))
    inject_adapters(made, LoRAConfig(rank=4, dropout=dropout), quantization=quantization)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made


def step(module, *, recomputed, autocast=False):
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    module.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = x
        for block in module:
            out = checkpoint(block, out, use_reentrant=False) if recomputed else block(out)
        loss = out.float().square().mean()
    with Products() as products:
        loss.backward()
    return products.large, [loss.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_last_product_of_a_block_is_not_computed_again(dropout, autocast):
    module = net(dropout=dropout)
    once, expected = step(module, recomputed=False, autocast=autocast)
    again, found = step(module, recomputed=True, autocast=autocast)
    assert again - once == 2  # up of two blocks, and down of none
    assert all(map(torch.equal, found, expected))


def test_a_product_that_something_needs_is_computed_again():
    module = net(Normed)
    once, expected = step(module, recomputed=False)
    again, found = step(module, recomputed=True)
    assert again - once == 4
    assert all(map(torch.equal, found, expected))


def test_a_quantized_last_layer_is_not_dequantized_for_it(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    module = net(quantization=QuantizationConfig(quant_type="nf4"))
    seen = []
    for name, layer in module.named_modules():
        if name.endswith("down"):
            real = layer.dequantize
            monkeypatch.setattr(layer, "dequantize", lambda dtype, real=real: seen.append(1) or real(dtype))
    step(module, recomputed=True)
    assert len(seen) == 2 * 2  # in the forward and in the backward product of two blocks


def test_a_gradient_of_a_gradient_goes_through_it():
    module = net(depth=1).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    parameter = module[0].down.adapters["default"].lora_A

    def penalty(run):
        (gradient,) = torch.autograd.grad(run(module[0], x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameter)[0]

    expected = penalty(lambda block, x: block(x))
    recomputed = penalty(lambda block, x: checkpoint(block, x, use_reentrant=False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # deferred, and not recomputed
        deferred = penalty(lambda block, x: block(x))
    for found in (deferred, recomputed):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_output_that_nobody_uses_costs_no_gradient():
    module = net(depth=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        module[0].up(torch.randn(3, WIDTH))
        used = module[0].down(torch.randn(3, HIDDEN))
    used.sum().backward()
    assert module[0].up.adapters["default"].lora_B.grad is None
    assert module[0].down.adapters["default"].lora_B.grad is not None


CHANGES = {
    "relu_": lambda y: torch.relu_(y),
    "add_": lambda y: y.add_(1.0),
    "setitem": lambda y: y.__setitem__((..., 0), 0.0),
    "view": lambda y: y.view(-1).mul_(2.0),
    "detached": lambda y: y.detach().zero_(),
}


@pytest.mark.parametrize("shape", [(6, WIDTH), (2, 3, WIDTH)], ids=["2d", "3d"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["plain", "checkpoint", "offload"])
def test_the_output_can_be_changed_in_place(how, change, shape):
    layer = net(depth=1)[0].up.double()  # in fp32 the sums below round differently on every CPU

    def changed(x, of=layer):
        y = of(x)
        CHANGES[change](y)
        return y.sum(-1)

    def gradients(run):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        layer.zero_grad()
        run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]

    def with_torchs_own(x):
        adapter = layer.adapters["default"]
        update = nn.functional.linear(nn.functional.linear(x, adapter.lora_A), adapter.lora_B * adapter.scaling)
        return changed(x, of=lambda x: nn.functional.linear(x, layer.weight, layer.bias) + update)

    def here(x):
        if how == "checkpoint":
            return checkpoint(changed, x, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu() if how == "offload" else contextlib.nullcontext():
            return changed(x)

    for found, expected in zip(gradients(here), gradients(with_torchs_own), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
