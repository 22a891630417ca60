"""Hazard: modules that pass for linear layers, or whose weight is used by others or in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_lora import LoRAConfig, TargetNotFoundError, UnsupportedSetupError, inject_adapters
from tests.conftest import WIDTH, TinyModule
from tests.hazards.runs import fit, lora, trained
from tests.states import base_of, same

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def net_with(layer: nn.Module, name: str = "odd") -> nn.Module:
    return nn.ModuleDict({name: layer, "plain": nn.Linear(4, 4)})


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


REWRITTEN = {
    "parametrizations.weight_norm": lambda: parametrizations.weight_norm(linear()),
    "parametrizations.spectral_norm": lambda: parametrizations.spectral_norm(linear()),
    "parametrizations.orthogonal": lambda: parametrizations.orthogonal(linear()),
    "utils.weight_norm": lambda: nn.utils.weight_norm(linear()),
    "utils.spectral_norm": lambda: nn.utils.spectral_norm(linear()),
    "prune": lambda: prune.l1_unstructured(linear(), "weight", amount=0.5),
    "register_parametrization": lambda: parametrized(),
}


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def parametrized() -> nn.Linear:
    layer = linear()
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.spectral_norm. is deprecated")
@pytest.mark.parametrize("kind", REWRITTEN)
def test_a_layer_whose_weight_is_computed_is_refused_by_name_and_skipped_by_preset(kind: str) -> None:
    with pytest.raises(TargetNotFoundError, match=r"'odd'.*cannot be adapted.*weight_norm"):
        inject_adapters(net_with(REWRITTEN[kind]()), LoRAConfig(target_modules=["odd"]))
    report = inject_adapters(net_with(REWRITTEN[kind]()), LoRAConfig())
    assert [row.name for row in report.layers] == ["plain"]
    assert "odd" in report.skipped


def test_a_script_module_is_refused_by_name_of_its_kind(make_trainer: Any) -> None:
    class Scripted(TinyModule):
        def build(self) -> None:
            self.net = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(TargetNotFoundError, match="'net' is a ScriptModule, whose layers cannot be adapted"):
        fit(make_trainer(callbacks=[lora()]), Scripted())


def test_a_script_module_beside_layers_is_refused_when_meant() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TargetNotFoundError, match="cannot carry an adapter"):
        inject_adapters(net_with(scripted), LoRAConfig(target_modules=["odd"]))


LAZY = {
    "LazyLinear": lambda: nn.LazyLinear(4),
    "LazyConv1d": lambda: nn.LazyConv1d(4, 1),
    "LazyBatchNorm1d": nn.LazyBatchNorm1d,
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_layer_without_a_shape_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedSetupError, match="'odd' is a lazy layer whose shape is not known yet"):
        inject_adapters(net_with(LAZY[kind]()), LoRAConfig())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_that_has_seen_a_batch_is_adapted() -> None:
    layer = nn.LazyLinear(4)
    layer(torch.zeros(2, 3))
    assert [row.shape for row in inject_adapters(layer_in(layer), LoRAConfig(rank=1)).layers] == [(4, 3)]


def layer_in(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": layer})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.projection = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.projection.weight = self.embedding.weight


def test_a_weight_tied_to_an_embedding_is_refused_by_name() -> None:
    with pytest.raises(TargetNotFoundError, match=r"tied to 'embedding'; merging would change both"):
        inject_adapters(Tied(), LoRAConfig(target_modules=["projection"]))


def test_a_weight_tied_to_an_embedding_is_skipped_by_preset() -> None:
    report = inject_adapters(Tied(), LoRAConfig())
    assert [row.name for row in report.layers] == ["body"]
    assert "tied" in report.skipped["projection"]


def test_two_layers_with_one_weight_are_refused_by_name() -> None:
    net = nn.ModuleDict({"a": linear(), "b": linear()})
    net["b"].weight = net["a"].weight
    with pytest.raises(TargetNotFoundError, match="tied to 'a'"):
        inject_adapters(net, LoRAConfig(target_modules=["b"]))


def test_an_integer_weight_is_refused_by_name() -> None:
    layer = linear()
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetNotFoundError, match="not a dense floating-point tensor"):
        inject_adapters(net_with(layer), LoRAConfig(target_modules=["odd"]))


@pytest.mark.parametrize("attribute", ["adapters", "active"])
def test_a_layer_with_an_attribute_of_ours_is_refused_by_name(attribute: str) -> None:
    layer = linear()
    setattr(layer, attribute, "mine")
    with pytest.raises(TargetNotFoundError, match="attribute 'adapters' or 'active' of its own"):
        inject_adapters(net_with(layer), LoRAConfig(target_modules=["odd"]))


class Bypassing(TinyModule):
    """Uses the weight of a layer without calling it."""

    def build(self) -> None:
        self.direct, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.direct.weight, self.direct.bias))


def test_a_bypassed_layer_is_refused_when_nothing_else_trains(make_trainer: Any) -> None:
    module = Bypassing()
    # The head is trained in full, so that there is a loss to go back through.
    trainer = make_trainer(callbacks=[lora(target_modules=["direct"], modules_to_save=["called"])])
    with pytest.raises(
        UnsupportedSetupError, match=r"No adapter got a gradient.*F\.linear\(x, layer\.weight\) bypasses"
    ):
        fit(trainer, module)


def test_a_bypassed_layer_beside_others_is_warned_of_by_name(make_trainer: Any) -> None:
    module = Bypassing()
    trainer = make_trainer(callbacks=[lora(target_modules=["direct", "called"])])
    with pytest.warns(UserWarning, match=r"2 of 4 adapter tensors got no gradient.*'direct\.adapters"):
        fit(trainer, module)


def test_a_layer_that_the_first_batch_does_not_use_is_warned_of_and_still_trains(make_trainer: Any) -> None:
    class Routed(TinyModule):
        def build(self) -> None:
            self.a, self.b, self.steps = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            return (self.a if self.steps % 2 else self.b)(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps = batch_idx
            return super().training_step(batch, batch_idx)

    module = Routed()
    with pytest.warns(UserWarning, match="either this batch did not use the layer"):
        fit(make_trainer(callbacks=[lora()]), module)
    assert trained(module)


def test_what_is_refused_is_left_as_it_was() -> None:
    net = Tied()
    before, flags = base_of(net), [p.requires_grad for p in net.parameters()]
    with pytest.raises(TargetNotFoundError):
        inject_adapters(net, LoRAConfig(target_modules=["projection"]))
    assert same(base_of(net), before)
    assert [p.requires_grad for p in net.parameters()] == flags


def test_a_model_that_peft_has_adapted_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UnsupportedSetupError, match=r"already has an adapter of PEFT.*merge_and_unload"):
        inject_adapters(adapted, LoRAConfig(rank=2))
    assert inject_adapters(adapted.merge_and_unload(), LoRAConfig(rank=2)).layers


def test_a_layer_whose_forward_accelerate_runs_is_not_adapted_for_nothing() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    hooks.add_hook_to_module(module[0], hooks.AlignDevicesHook("cpu"))
    report = inject_adapters(module, LoRAConfig(rank=2))
    assert [row.name for row in report.layers] == ["1"]
    assert "accelerate" in report.skipped["0"]
    with pytest.raises(TargetNotFoundError, match="accelerate"):
        inject_adapters(nn.Sequential(module[0]), LoRAConfig(rank=2))
