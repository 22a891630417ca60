"""Hosts: what a layer with adapters computes, keeps and gives back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, disable_adapters, inject_adapters, remove_adapters
from lightning_lora.layers import (
    AdaptedConv1D,
    AdaptedLayer,
    AdaptedLinear,
    adapted_layers,
    attach_adapter,
    detach_adapters,
    host_of,
)
from tests.conftest import TinyModule, make_loader
from tests.hazards import runs as hazards


class OwnLinear(nn.Linear):
    """A user's subclass whose forward names its argument differently and takes another."""

    def forward(self, hidden: Tensor, *, factor: float = 1.0) -> Tensor:
        return super().forward(hidden) * factor


def linear() -> nn.Module:
    return nn.Linear(5, 3)


def conv1d() -> nn.Module:
    return Conv1D(3, 5)  # out, in: the weight is (in, out)


HOSTS = [pytest.param(linear, id="Linear"), pytest.param(conv1d, id="Conv1D")]


def adapt(layer: nn.Module, **options: Any) -> AdaptedLayer:
    inject_adapters(nn.ModuleDict({"layer": layer}), LoRAConfig(**{"rank": 2, **options}))
    assert isinstance(layer, AdaptedLayer)
    return layer


def train(layer: AdaptedLayer) -> AdaptedLayer:
    for parameter in layer.adapters.parameters():
        nn.init.normal_(parameter)
    return layer


def test_hosts_are_recognised_by_class() -> None:
    assert host_of(nn.Linear(2, 2)) is AdaptedLinear
    assert host_of(OwnLinear(2, 2)) is AdaptedLinear
    assert host_of(Conv1D(2, 2)) is AdaptedConv1D
    assert host_of(adapt(nn.Linear(2, 2))) is AdaptedLinear
    for other in (nn.Conv1d(2, 2, 1), nn.Embedding(2, 2), nn.Bilinear(2, 2, 2), nn.LayerNorm(2), nn.LSTM(2, 2)):
        assert host_of(other) is None


@pytest.mark.parametrize("build", HOSTS)
def test_the_matrix_of_a_weight_is_out_by_in(build: Any) -> None:
    layer = adapt(build())
    assert layer.matrix_shape == (3, 5)
    adapter = layer.adapter("default")
    assert adapter.get_parameter("lora_A").shape == (2, 5)
    assert adapter.get_parameter("lora_B").shape == (3, 2)


@pytest.mark.parametrize("build", HOSTS)
def test_the_matrix_is_a_view_and_makes_the_round_trip(build: Any) -> None:
    layer = adapt(build())
    assert layer.weight_matrix().data_ptr() == layer.weight.data_ptr()
    assert torch.equal(layer.as_weight(layer.weight_matrix()), layer.weight)


@pytest.mark.parametrize("build", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_0_is_bitwise_the_base(build: Any, dtype: torch.dtype) -> None:
    layer = build().to(dtype)
    x = torch.randn(4, 5, dtype=dtype)
    before = layer(x)
    assert torch.equal(adapt(layer)(x), before)


@pytest.mark.parametrize("build", HOSTS)
def test_the_output_is_that_of_the_merged_matrix(build: Any) -> None:
    layer = train(adapt(build().double()))
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.merged_matrix(), layer.bias))  # type: ignore[arg-type]


@pytest.mark.parametrize("build", HOSTS)
def test_merging_happens_in_fp32_at_least_and_changes_nothing(build: Any) -> None:
    layer = train(adapt(build().bfloat16()))
    weight = layer.weight.clone()
    assert layer.merged_matrix().dtype == torch.float32
    assert torch.equal(layer.weight, weight)
    assert not layer.merged_matrix().requires_grad


def test_adapters_act_in_the_order_of_active() -> None:
    root = nn.ModuleDict({"layer": nn.Linear(5, 3)})
    x = torch.randn(4, 5)
    base = root["layer"](x)
    for name in ("one", "two"):
        inject_adapters(root, LoRAConfig(rank=2, seed=len(name)), name=name)
    layer = root["layer"]
    assert isinstance(layer, AdaptedLayer)
    train(layer)
    assert layer.active == ("two",)
    second = layer(x) - base
    layer.active = ("one",)
    first = layer(x) - base
    layer.active = ("one", "two")
    torch.testing.assert_close(layer(x), base + first + second)
    layer.active = ()
    assert torch.equal(layer(x), base)


def test_keyword_arguments_reach_the_own_forward() -> None:
    layer = OwnLinear(5, 3)
    x = torch.randn(4, 5)
    before = layer(x, factor=2.0)
    assert torch.equal(adapt(layer)(x, factor=2.0), before)


@pytest.mark.parametrize(
    ("build", "name"),
    [(linear, "input"), (conv1d, "x"), (lambda: OwnLinear(5, 3), "hidden")],
    ids=["Linear", "Conv1D", "OwnLinear"],
)
def test_the_input_may_be_passed_by_the_name_that_the_layer_gives_it(build: Any, name: str) -> None:
    layer = build()
    x = torch.randn(4, 5)
    before = layer(**{name: x})
    assert torch.equal(adapt(layer)(**{name: x}), before)
    assert torch.equal(train(layer)(**{name: x}), layer(x))


def test_attach_and_detach_leave_exactly_the_same_object() -> None:
    layer = nn.Linear(5, 3)
    contents = {key: copy.copy(value) for key, value in layer.__dict__.items()}
    attached = attach_adapter(layer, "default")
    assert attached is layer
    adapters = detach_adapters(attached)
    assert list(adapters) == []
    assert type(layer) is nn.Linear
    assert layer.__dict__ == contents


def test_a_shared_layer_is_listed_once_and_adapted_at_both_places() -> None:
    shared = nn.Linear(4, 4)
    root = nn.ModuleDict({"first": shared, "second": shared})
    inject_adapters(root, LoRAConfig(rank=2))
    assert [name for name, _ in adapted_layers(root)] == ["first"]
    train(shared)  # type: ignore[arg-type]
    x = torch.randn(2, 4)
    assert torch.equal(root["first"](x), root["second"](x))
    assert not torch.equal(root["second"](x), nn.functional.linear(x, shared.weight, shared.bias))


def test_state_keys_are_those_of_the_base_and_additions() -> None:
    root = nn.ModuleDict({"layer": nn.Linear(5, 3)})
    before = list(root.state_dict())
    inject_adapters(root, LoRAConfig(rank=2))
    keys = list(root.state_dict())
    assert [key for key in keys if key in before] == before
    assert set(keys) - set(before) == {
        "layer.adapters.default.lora_A",
        "layer.adapters.default.lora_B",
    }
    remove_adapters(root)
    assert list(root.state_dict()) == before


def test_a_layer_that_is_the_root_itself_can_be_adapted() -> None:
    layer = nn.Linear(5, 3)
    x = torch.randn(2, 5)
    before = layer(x)
    inject_adapters(layer, LoRAConfig(rank=2))
    assert set(layer.state_dict()) == {"weight", "bias", "adapters.default.lora_A", "adapters.default.lora_B"}
    assert torch.equal(layer(x), before)
    remove_adapters(layer)
    assert type(layer) is nn.Linear


def test_one_dimension_inputs_and_empty_batches_pass() -> None:
    layer = train(adapt(nn.Linear(5, 3)))
    x = torch.randn(5)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    assert layer(torch.zeros(0, 5)).shape == (0, 3)


class Watching(nn.Linear):
    """Notes the weight that its forward finds."""

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__.setdefault("seen", []).append(state_of(self.weight))
        return super().forward(input)


def state_of(weight: Tensor) -> tuple[int, int, list[float]]:
    return weight.data_ptr(), weight._version, weight.flatten().tolist()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_forward_never_puts_anything_in_the_place_of_the_weight(training: bool, grad: bool) -> None:
    layer = Watching(5, 3)
    train(adapt(layer))
    before, seen = state_of(layer.weight), layer.__dict__.setdefault("seen", [])
    layer.register_forward_pre_hook(lambda *_: seen.append(state_of(layer.weight)))
    layer.register_forward_hook(lambda *_: seen.append(state_of(layer.weight)))
    x = torch.randn(4, 5)
    with torch.set_grad_enabled(grad):
        for mode in (training, not training, training):
            layer.train(mode)
            seen.append(state_of(layer.weight))
            output = layer(x)
    assert not torch.allclose(output, nn.functional.linear(x, layer.weight, layer.bias))
    assert len(seen) == 12
    assert all(state == before for state in seen)
    assert state_of(layer.weight) == before


def test_a_trainer_run_with_the_callback_leaves_disabled_adapters_disabled(make_trainer: Any) -> None:
    module, callback = TinyModule(), hazards.lora()
    loader = make_loader()
    base = hazards.metric(make_trainer().test(module, loader, verbose=False))
    hazards.fit(make_trainer(max_epochs=3, callbacks=[callback]), module)
    with disable_adapters(module):
        for again in (callback, hazards.lora()):
            assert hazards.metric(make_trainer(callbacks=[again]).test(module, loader, verbose=False)) == base
    adapted = hazards.metric(make_trainer(callbacks=[callback]).test(module, loader, verbose=False))
    assert adapted != pytest.approx(base, rel=1e-3)


def test_a_layer_that_holds_an_adapter_already_keeps_what_is_active() -> None:
    layer = adapt(nn.Linear(5, 3))
    for active in ((), ("other",)):
        layer.active = active
        assert attach_adapter(layer, "default").active == active
    assert attach_adapter(layer, "new").active == ("new",)


def test_a_class_with_a_forward_of_its_own_is_told_from_one_without() -> None:
    class Named(nn.Linear):
        """Changes nothing."""

    assert [adapt(build()).has_own_forward for build in (linear, conv1d)] == [False, False]
    assert not adapt(Named(5, 3)).has_own_forward
    assert adapt(OwnLinear(5, 3)).has_own_forward
