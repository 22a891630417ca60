"""Layers with the same input hand its gradient on, and what they compute stays the same."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters, remove_adapters, unmerge_adapters
from lightning_lora.fused import siblings
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import lora


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


def taken(module, x):
    """How many layers took what another one left in a forward pass."""
    found = []
    real = siblings.take_joint

    def take(*args):
        found.append(real(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siblings, "take_joint", take)
        module(x.clone().requires_grad_())
    return sum(joint is not None for joint in found)


class Rows(TorchDispatchMode):
    """Counts products with an A, by how many rows it has."""

    def __init__(self):
        super().__init__()
        self.ranks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            inner, columns = args[-1].shape
            if inner == WIDTH and columns < WIDTH:
                self.ranks.append(columns)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float64, False, 1e-10), (torch.float32, False, 1e-5), (torch.float32, True, 0.03)],
    ids=["fp64", "fp32", "bf16-mixed"],
)
def test_gradients_are_the_same_from_the_first_step_on(dtype, autocast, tolerance):
    module = net(dtype)
    expected = step(plain(module), batch(dtype), autocast=autocast)
    assert taken(module, batch(dtype)) == 2 * 2  # k and v of two blocks
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


def test_q_k_and_v_have_one_product_with_their_A():
    module, x = net(depth=1), batch()
    with Rows() as products:
        module(x)
    assert products.ranks == [4 * 3, 3]  # of q, k, v and, in case that it has the same input, out; of out


def test_a_layer_that_got_another_input_is_trained_by_its_own():
    """q multiplies by the A of all; v, which is called with something else, must not take that product."""

    class Crossed(Attention):
        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(2 * x) + self.out(x)

    module = nn.Sequential(Crossed()).double()
    inject_adapters(module, LoRAConfig(rank=2, target_modules=["q", "k", "v", "out"]))
    nn.init.normal_(module[0].v.adapters["default"].lora_B)
    assert close(step(module, batch()), step(plain(module), batch()), 1e-10)


def test_a_layer_that_is_not_called_gets_no_gradient():
    module = net(depth=1)
    module[0].skip = "k"
    step(module, batch())
    gradients = {name: p.grad is not None for name, p in module.named_parameters() if "lora_" in name}
    assert {name.split(".")[1] for name, has in gradients.items() if not has} == {"k"}
    assert sum(gradients.values()) == 2 * 3


@pytest.mark.parametrize("changed", ["weights", "mode", "adapter"])
def test_what_was_left_is_not_taken_after_a_change(changed):
    class Changing(Attention):
        def forward(self, x):
            first = self.q(x)
            with torch.no_grad():
                if changed == "weights":
                    self.k.adapters["default"].lora_A.mul_(2)
                elif changed == "mode":
                    self.k.eval()
                else:
                    self.k.active = ()
            return first, self.k(x)

    module = nn.Sequential(Changing())
    inject_adapters(module, LoRAConfig(rank=2, dropout=0.5, target_modules=["q", "k"]))
    nn.init.normal_(module[0].k.adapters["default"].lora_B)
    x = batch(torch.float32)
    torch.manual_seed(0)
    found = module.train()(x)[1]
    if changed == "weights":  # what it computes alone, from the number that it drew
        torch.manual_seed(0)
        torch.randint(0, 2**31 - 1, ())
    torch.testing.assert_close(found, module[0].k(x))


def test_layers_with_the_same_input_drop_the_same_of_it():
    module = net(torch.float32, dropout=0.5, depth=1).train()
    block, x = module[0], batch(torch.float32)
    for name in "kv":
        for factor in ("lora_A", "lora_B"):
            setattr(block.get_submodule(name).adapters["default"], factor, getattr(block.q.adapters["default"], factor))
    q, k, v = (
        layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias) for layer in (block.q, block.k, block.v)
    )
    torch.testing.assert_close(q, k)
    torch.testing.assert_close(q, v)
    again = block.q(x) - torch.nn.functional.linear(x, block.q.weight, block.q.bias)
    assert not torch.allclose(q, again)


def losses_of_heads(block, x):
    return [getattr(block, name)(x).square().sum() for name in "qkv"]


@pytest.mark.parametrize("needs_gradient", [False, True], ids=["detached", "leaf"])
@pytest.mark.parametrize("when", ["after all", "at once"])
def test_heads_over_one_input_have_backward_passes_of_their_own(needs_gradient, when):
    found = []
    for module in (net(depth=1), plain(net(depth=1))):
        x = batch().requires_grad_(needs_gradient)
        if when == "after all":
            for loss in losses_of_heads(module[0], x):
                loss.backward()
        else:
            for name in "qkvq":
                getattr(module[0], name)(x).square().sum().backward()
        found.append([x.grad] if needs_gradient else [])
        found[-1] += [p.grad for name, p in module.named_parameters() if "lora_" in name and ".out." not in name]
    assert close(*found, 1e-10)


def test_an_input_that_changes_between_two_backward_passes_is_noticed():
    block, x = net(depth=1)[0], batch()
    losses = losses_of_heads(block, x)
    losses[0].backward()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between two backward passes"):
        losses[1].backward()


def test_a_factor_that_changes_between_two_backward_passes_is_noticed():
    block, x = net(depth=1)[0], batch()
    q, k, _ = (getattr(block, name)(x) for name in "qkv")
    k.sum().backward(retain_graph=True)
    with torch.no_grad():
        block.q.adapters["default"].lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="lora_B was changed in place"):
        q.sum().backward()


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_changes_before_the_backward_pass_is_noticed_where_it_is_used(name, factor):
    block, x = net(depth=1)[0], batch()
    outputs = {name: getattr(block, name)(x) for name in "qkv"}
    with torch.no_grad():
        getattr(block.get_submodule(name).adapters["default"], factor).mul_(2)
    outputs["v"].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="lora_B was changed in place"):
        outputs[name].sum().backward()


def test_a_part_whose_graph_is_freed_has_no_second_backward_pass():
    block, x = net(depth=1)[0], batch()
    q, _, _ = (getattr(block, name)(x) for name in "qkv")
    q.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        q.sum().backward()


def test_layers_that_share_an_A_keep_their_own_scaling():
    block = net(depth=1)[0]
    k, v = (layer.adapters["default"] for layer in (block.k, block.v))
    v.lora_A, v.scaling = k.lora_A, 3 * k.scaling
    x = batch()
    block.q(x)
    update = block.v(x) - nn.functional.linear(x, block.v.weight, block.v.bias)
    torch.testing.assert_close(update, v.scaling * x @ v.lora_A.T @ v.lora_B.T)


def test_second_derivatives_take_in_all_layers_that_were_called_and_no_others():
    found = []
    for module in (net(depth=1), plain(net(depth=1))):
        block, x = module[0], batch().requires_grad_()
        block.k.adapters["default"].scaling = 0.5
        loss = block.q(x).square().sum() + block.k(x).square().sum()
        with torch.no_grad():
            block.v.adapters["default"].lora_A.add_(1)
        gradient = torch.autograd.grad(loss, x, create_graph=True)[0]
        gradient.square().sum().backward()
        trained = [p for layer in (block.q, block.k) for p in layer.adapters.parameters()]
        found.append([x.grad, *(p.grad for p in trained)])
    assert close(*found, 1e-10)


@pytest.mark.parametrize("around", ["each", "all"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_both_runs_of_a_checkpoint_drop_the_same(reentrant, around):
    """Of a sum, the gradient of B times B is what the update adds."""
    block = net(dropout=0.5, depth=1)[0].train()
    layers, x = (block.q, block.k, block.v), batch().requires_grad_()
    if around == "each":
        outputs = [checkpoint(layer, x, use_reentrant=reentrant) for layer in layers]
    else:
        outputs = checkpoint(lambda x: tuple(layer(x) for layer in layers), x, use_reentrant=reentrant)
    sum(output.sum() for output in outputs).backward()
    for layer, output in zip(layers, outputs):
        lora_B = layer.adapters["default"].lora_B.detach()
        added = (output.detach() - torch.nn.functional.linear(x.detach(), layer.weight, layer.bias)).sum()
        gradient = layer.adapters["default"].lora_B.grad
        assert float((lora_B * gradient).sum()) == pytest.approx(float(added), rel=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_checkpoint_around_one_sibling_passes(dropout, needs_gradient):
    block = net(dropout=dropout, depth=1)[0].train()
    x = batch().requires_grad_(needs_gradient)
    (block.q(x).sum() + checkpoint(block.k, x, use_reentrant=False).sum() + block.v(x).sum()).backward()
    for layer in (block.q, block.k, block.v):
        assert layer.adapters["default"].lora_A.grad.any()


def test_a_parametrized_factor_is_used_and_trained():
    module = net(depth=1)
    for layer in module[0].children():
        nn.utils.parametrizations.weight_norm(layer.adapters["default"], "lora_A")
    found, expected = step(module, batch()), step(plain(module), batch())
    assert close(found, expected, 1e-10)


def test_a_layer_that_was_not_called_may_change_before_the_backward_pass():
    block = net(depth=1)[0]
    loss = block.q(batch()).sum()
    with torch.no_grad():
        block.k.adapters["default"].lora_A.add_(1)
    loss.backward()


def test_an_input_that_starts_to_need_a_gradient_gets_all_of_it_from_then_on():
    block, x = net(depth=1)[0], batch()
    block.q(x)
    x.requires_grad_()
    block.k(x).sum().backward()
    assert x.grad.any()


def test_large_ranks_are_not_joined_on_a_guess():
    module = nn.Sequential(Attention()).double()
    inject_adapters(module, LoRAConfig(rank=60, target_modules=["q", "k", "v", "out"]))
    with Rows() as products:
        module(batch())
    assert not products.ranks  # all as wide as the input or wider: counted by the gradients instead
    assert close(step(module, batch()), step(plain(module), batch()), 1e-10)


def test_layers_of_different_ranks_share_a_product():
    module = nn.Sequential(Attention()).double()
    inject_adapters(
        module, LoRAConfig(rank=2, target_modules=["q", "k", "v", "out"], rank_pattern={"k": 5}, dropout=0.0)
    )
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with Rows() as products:
        found = step(module, batch())
    assert products.ranks[0] == 2 + 5 + 2 + 2
    assert close(found, step(plain(module), batch()), 1e-10)


@pytest.mark.parametrize(("reentrant", "dropout"), [(False, 0.2), (True, 0.0)])
def test_recomputed_blocks_give_the_same_gradients(reentrant, dropout):
    module = net(dropout=dropout)

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


def test_in_a_run_nothing_waits_for_a_layer_after_the_backward_pass(make_trainer):
    class Early(TinyModule):
        """Its last call is of a layer with one of its width after it in its parent."""

        def build(self):
            self.first, self.never = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

        def forward(self, x):
            return self.first(x)

        def on_after_backward(self):
            waiting.append(siblings.is_left())

    waiting = []
    with pytest.warns(UserWarning, match="2 of 4 adapter tensors got no gradient"):
        make_trainer(callbacks=[lora()]).fit(Early(), make_loader(), make_loader())
    assert waiting == [False, False]


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
    assert not any("followers" in vars(child) for child in module.modules())
    unmerge_adapters(module)
    assert taken(module, batch()) == 2 * 2


def test_a_layer_knows_those_of_its_width_that_come_after_it_in_its_parent():
    module = net(depth=1)
    assert [child.followers for child in module[0].children()] == [
        (module[0].k, module[0].v, module[0].out),
        (module[0].v, module[0].out),
        (module[0].out,),
        (),
    ]
    remove_adapters(module)
    assert not any("followers" in vars(child) for child in module.modules())


def test_at_most_three_are_guessed_and_none_in_a_list_or_a_sequence():
    wide = nn.Module()
    for index in range(6):
        wide.add_module(f"fc{index}", nn.Linear(WIDTH, WIDTH))
    lists = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    row = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    module = nn.ModuleList([wide, lists, row])
    inject_adapters(module, LoRAConfig(rank=2, target_modules="all-linear"))
    assert [len(child.followers) for child in wide.children()] == [3, 3, 3, 2, 1, 0]
    assert not any(child.followers for child in (*lists, *row))
