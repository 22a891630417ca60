"""Layers with the same input hand its gradient on, and what they compute stays the same."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters, remove_adapters, unmerge_adapters
from lightning_lora.fused import siblings

WIDTH = 16


class Attention(nn.Module):
    """q, k and v of one input, which something else uses, too."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.skip = ""

    def forward(self, x):
        parts = [layer(x) for name, layer in self.named_children() if name in "qkv" and name != self.skip]
        return self.out(torch.tanh(sum(parts) * x)) + x


def net(dtype=torch.float64, dropout=0.0, depth=2):
    torch.manual_seed(0)
    made = nn.Sequential(*(Attention() for _ in range(depth))).to(dtype)
    inject_adapters(made, LoRAConfig(rank=3, dropout=dropout, target_modules=["q", "k", "v", "out"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return made


def plain(made):
    """The same on the path of torch's own operations."""
    made = copy.deepcopy(made)
    for name, child in made.named_modules():
        if name.endswith("default"):
            child.register_forward_hook(lambda *_: None)
    return made


def batch(dtype=torch.float64):
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(module, x, *, autocast=False, forward=None):
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (forward or module)(x).float().square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def close(found, expected, tolerance):
    return all((a.double() - b.double()).norm() <= tolerance * b.double().norm() for a, b in zip(found, expected))


def stand_ins(module, x):
    """How many layers took one in a forward pass."""
    taken = []
    real = siblings.take_stand_in

    def take(*args):
        taken.append(real(*args))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siblings, "take_stand_in", take)
        module(x.clone().requires_grad_())
    return sum(found is not None for found in taken)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float64, False, 1e-10), (torch.float32, False, 1e-5), (torch.float32, True, 0.03)],
    ids=["fp64", "fp32", "bf16-mixed"],
)
def test_gradients_are_the_same_from_the_first_step_on(dtype, autocast, tolerance):
    module = net(dtype)
    expected = step(plain(module), batch(dtype), autocast=autocast)
    assert stand_ins(module, batch(dtype)) == 2 * 2  # k and v of two blocks
    first, second = (step(module, batch(dtype), autocast=autocast) for _ in range(2))
    assert close(first, expected, tolerance)
    assert all(map(torch.equal, first, second))


def test_the_input_is_cast_once_under_autocast():
    module, x = net(torch.float32, depth=1), batch(torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        module(x.clone().requires_grad_())
    copies = {t.untyped_storage().data_ptr() for t in kept if t.dtype == torch.bfloat16 and t.shape == x.shape}
    assert len(copies) == 3  # one input of q, k and v; their sum, for the product with x; the input of the last layer


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_give_the_same_gradients(reentrant):
    module = net(dropout=0.2)

    def recomputed(x):
        for block in module:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    for _ in range(2):
        torch.manual_seed(3)
        expected = step(module, batch())
        torch.manual_seed(3)
        found = step(module, batch(), forward=recomputed)
        assert close(found, expected, 1e-12)


def test_a_sibling_that_is_left_out_changes_nothing_but_speed():
    module = net()
    for skip in ("k", "v", ""):
        for block in module:
            block.skip = skip
        for _ in range(2):
            found = step(module, batch())
            wanted = step(plain(module), batch())
            assert close([g for g in found if g is not None], [g for g in wanted if g is not None], 1e-10)


def test_an_input_that_changes_between_siblings_is_not_taken_for_the_same():
    class Changing(Attention):
        def forward(self, x):
            x = x + 0
            first = self.q(x.detach().requires_grad_())
            with torch.no_grad():
                x.mul_(2)
            return first + self.k(x)

    module = nn.Sequential(Changing())
    inject_adapters(module, LoRAConfig(rank=2, target_modules=["q", "k"]))
    for _ in range(2):
        x = batch(torch.float32)
        torch.testing.assert_close(module(x), module[0].q(x) + module[0].k(2 * x))


def test_nothing_of_a_forward_pass_without_a_backward_stays():
    module = net()
    hidden = batch().clone().requires_grad_() * 2
    output = module(hidden)
    alive = weakref.ref(hidden), weakref.ref(output)
    gc.disable()
    try:
        del hidden, output
        assert [reference() for reference in alive] == [None, None]
        assert not siblings.is_left()
    finally:
        gc.enable()


def test_hooks_on_siblings_see_each_of_them():
    module, seen = net(depth=1), []
    for name in ("q", "k", "v"):
        getattr(module[0], name).register_forward_hook(lambda *_, name=name: seen.append(name))
        getattr(module[0], name).register_full_backward_hook(lambda *_, name=name: seen.append(f"{name} backward"))
    for _ in range(2):
        seen.clear()
        step(module, batch())
        assert sorted(seen) == ["k", "k backward", "q", "q backward", "v", "v backward"]


def test_second_derivatives_pass_through_siblings():
    module = net(depth=1)
    x = batch()[:1, :2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x), (x,))


def test_siblings_are_known_again_after_a_merge_and_its_undoing():
    module = net()
    merge_adapters(module)
    assert not any("is_followed" in vars(child) for child in module.modules())
    unmerge_adapters(module)
    assert stand_ins(module, batch()) == 2 * 2


def test_only_layers_with_a_sibling_after_them_leave_something():
    module = net(depth=1)
    assert {name for name, child in module[0].named_children() if child.is_followed} == {"q", "k", "v"}
    remove_adapters(module)
    assert not any("is_followed" in vars(child) for child in module.modules())
