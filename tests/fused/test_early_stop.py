"""A recomputation ends where all that the backward needs is there: the last layer's product is not computed again."""

from __future__ import annotations

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

    def penalty(recomputed):
        out = checkpoint(module[0], x, use_reentrant=False) if recomputed else module[0](x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameter)[0]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # deferred, and not recomputed
        deferred = penalty(recomputed=False)
    torch.testing.assert_close(deferred, penalty(recomputed=False), rtol=1e-10, atol=1e-12)


def test_an_output_that_nobody_uses_costs_no_gradient():
    module = net(depth=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        module[0].up(torch.randn(3, WIDTH))
        used = module[0].down(torch.randn(3, HIDDEN))
    used.sum().backward()
    assert module[0].up.adapters["default"].lora_B.grad is None
    assert module[0].down.adapters["default"].lora_B.grad is not None
