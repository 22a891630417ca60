"""An input that is a product is not kept for the backward pass, and every derivative stays bit for bit what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import alive_bytes
from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.fused import factored_input
from lightning_lora.planning import plan_memory

TOKENS, WIDTH, INNER = 256, 16, 256  # a product of 2**16 values: the fewest that are not kept
SIZE = TOKENS * INNER


class Gated(nn.Module):
    """The feed-forward part of a Llama; ``downs`` layers get the product."""

    def __init__(self, downs: int = 1) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.ModuleDict({f"d{index}": nn.Linear(INNER, WIDTH) for index in range(downs)})

    def product(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return torch.stack([down(y) for down in self.down.values()]).sum(0)


def adapted(dtype: torch.dtype = torch.float32, *, dropout: float = 0.0, downs: int = 1) -> Gated:
    torch.manual_seed(0)
    made = Gated(downs).to(dtype)
    inject_adapters(made, LoRAConfig(rank=2, dropout=dropout, target_modules="all-linear"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def factors() -> list[Tensor]:
    """Two that were computed, as parameters were not."""
    drawn = torch.Generator().manual_seed(2)
    return [torch.randn(TOKENS, INNER, generator=drawn).requires_grad_() * 1.0 for _ in range(2)]


tells_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="this torch does not tell who holds a factor"
)


def gradients(module: nn.Module, x: Tensor, forward=None) -> dict[str, Tensor | None]:
    module.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    (forward or module)(x).float().square().sum().backward()
    trained = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**trained, "input": x.grad}


@pytest.fixture
def keep_inputs(monkeypatch):
    """A function after which inputs are kept, as torch's own operations do."""
    return lambda: monkeypatch.setattr(factored_input, "_LEAST", 2**62)


@pytest.mark.parametrize("downs", [1, 2], ids=["one layer", "layers that share"])
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_gradient_is_bitwise_the_one_with_the_product_kept(dtype, dropout, downs, keep_inputs):
    module = adapted(dtype, dropout=dropout, downs=downs)
    found = gradients(module, batch(dtype))
    keep_inputs()
    expected = gradients(module, batch(dtype))
    assert found.keys() == expected.keys() and len(found) == 2 * (2 + downs) + 1
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@tells_hooks
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
def test_what_waits_for_the_backward_pass_is_smaller_by_the_product(autocast, keep_inputs):
    module = adapted()

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(batch())

    forward()  # makes casts of weights that stay
    _, without = alive_bytes(forward)
    keep_inputs()
    _, kept = alive_bytes(forward)
    assert kept - without == SIZE * (2 if autocast else 4)


@tells_hooks
def test_the_memory_plan_counts_no_product(keep_inputs):
    options = {"config": LoRAConfig(rank=2, target_modules="all-linear"), "batch": (torch.empty(TOKENS, WIDTH),)}

    def kept() -> int:
        return plan_memory(Gated(), **options, step=lambda module, batch: module(batch[0]).sum()).step.kept

    without = kept()
    keep_inputs()
    assert kept() - without == SIZE * 4


def test_second_derivatives_reach_the_product_and_its_factors(keep_inputs):
    down = adapted().down["d0"]

    def second():
        left, right = factors()
        x = left * right
        first = torch.autograd.grad(down(x).square().sum(), [x, *down.adapters.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, left, right])

    found = second()
    keep_inputs()
    for got, expected in zip(found, second(), strict=True):
        assert torch.equal(got, expected)


def first_gradient(down: nn.Module, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(down(x).square().sum(), [down.adapters["default"].lora_A])
    return found


def test_a_product_that_was_changed_is_kept(keep_inputs):
    down = adapted().down["d0"]

    def changed(change) -> Tensor:
        left, right = factors()
        x = left * right
        return first_gradient(down, change(x))

    def quietly(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.clamp_(-0.1, 0.1)  # autograd goes on to believe that it is the product
        return x

    changes = [quietly, lambda x: x.mul_(2.0), lambda x: x.add_(1.0)]
    found = [changed(change) for change in changes]
    keep_inputs()
    for got, change in zip(found, changes, strict=True):
        assert torch.equal(got, changed(change))


@pytest.mark.parametrize("kind", ["constant", "row", "number"])
def test_factors_of_other_kinds(kind, keep_inputs):
    """A factor without gradient, a row, and a number that is trained: a bf16 tensor times an fp32 number stays bf16."""
    down = adapted(torch.bfloat16).down["d0"]

    def run() -> Tensor:
        left, right = factors()
        other = {"constant": right.detach().bfloat16(), "row": right[:1].bfloat16(), "number": right[0, 0]}[kind]
        return first_gradient(down, left.bfloat16() * other)

    found = run()
    keep_inputs()
    assert torch.equal(found, run())


@tells_hooks
def test_a_factor_that_is_changed_before_the_backward_pass_is_refused():
    down = adapted().down["d0"]
    left, right = factors()
    output = down(left * right)
    right.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(output.sum(), [down.adapters["default"].lora_A])


def test_a_product_whose_own_backward_pass_is_over_still_gives_the_gradient_of_a():
    down = adapted().down["d0"]
    left, right = factors()
    x = left * right
    x.sum().backward()
    expected = first_gradient(down, (left * right).detach())
    assert torch.equal(first_gradient(down, x), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_product_out_of_a_checkpoint_is_not_computed_before_the_backward_pass(reentrant):
    module, calls = adapted(), []

    def product(x: Tensor) -> Tensor:
        calls.append(x)
        return module.product(x)

    def forward(x: Tensor) -> Tensor:
        y = module.down["d0"](checkpoint(product, x, use_reentrant=reentrant))
        assert len(calls) == 1
        return y

    found = gradients(module, batch(), forward)
    assert len(calls) == 2
    for name, value in gradients(module, batch()).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["checkpoint", "reentrant", "offload"])
def test_hooks_on_what_is_saved_decide(how):
    module = adapted(dropout=0.0 if how == "reentrant" else 0.3)  # there layers share no mask

    def forward(x: Tensor) -> Tensor:
        if how == "offload":
            with torch.autograd.graph.save_on_cpu():
                return module(x)
        return checkpoint(module, x, use_reentrant=how == "reentrant")

    found = gradients(module, batch(), forward)
    for name, value in gradients(copy.deepcopy(module), batch()).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_small_products_are_kept():
    down = adapted().down["d0"]
    left, right = (factor[:-1] for factor in factors())
    x = left * right
    _, kept = alive_bytes(lambda: down(x))
    assert kept < 2**16  # the output and what has the rank: x itself is held here
    address = x.data_ptr()
    output = down(x)
    (saved,) = [t for t in output.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
    assert saved.data_ptr() == address


@pytest.mark.parametrize("downs", [1, 2], ids=["one layer", "layers that share"])
def test_a_frozen_a_keeps_no_input(downs):
    module = adapted(downs=downs)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_A" not in name and parameter.requires_grad)
    found = gradients(module, batch())
    assert [*found] == [name for name, _ in module.named_parameters() if "lora_B" in name] + ["input"]


def test_a_factor_that_is_a_parameter_is_not_held_on_to():
    """Sharding by module may free it until the backward pass of its own module: a norm's weight."""
    down, weight = adapted().down["d0"], nn.Parameter(torch.ones(INNER))
    left, _ = factors()
    x = left * weight
    (saved,) = [t for t in down(x).grad_fn.saved_tensors if t is not None and t.shape == x.shape]
    assert saved.data_ptr() == x.data_ptr()
