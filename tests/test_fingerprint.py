"""The fingerprint tells bases apart, and knows one again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, remove_adapters
from lightning_lora.fingerprint import SAMPLES_PER_TENSOR, base_fingerprint, describe_difference, is_fingerprint
from lightning_lora.record import find_record


def build(seed: int = 0, width: int = 8, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 4))
    inject_adapters(net, LoRAConfig(**{"rank": 2, **options}))
    return net


def fingerprint(net: nn.Module) -> dict[str, Any]:
    record = find_record(net)
    assert record is not None
    return base_fingerprint(net, record)


def difference(net: nn.Module, other: nn.Module) -> str | None:
    return describe_difference(fingerprint(net), fingerprint(other))


def test_the_same_base_has_no_difference() -> None:
    assert difference(build(), build()) is None


def test_it_opens_with_weights_only() -> None:
    file = io.BytesIO()
    torch.save(fingerprint(build()), file)
    file.seek(0)
    assert describe_difference(torch.load(file, weights_only=True), fingerprint(build())) is None


def test_adapters_are_no_part_of_it() -> None:
    net = build()
    before = fingerprint(net)
    assert not any("lora" in name for name in before["tensors"])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora" in name:
                parameter.normal_()
    assert describe_difference(before, fingerprint(net)) is None
    assert difference(build(rank=2), build(rank=3)) is None


def test_what_is_trained_in_full_is_no_part_of_it() -> None:
    net = build(modules_to_save=["1"])
    before = fingerprint(net)
    assert "1.weight" not in before["tensors"]
    with torch.no_grad():
        net.get_parameter("1.weight").add_(1.0)
    assert describe_difference(before, fingerprint(net)) is None


def test_another_seed_is_told_by_the_names_of_what_differs() -> None:
    message = difference(build(), build(seed=1))
    assert message is not None
    assert "the values of 4 of 6 parameters differ: 0.weight, 0.bias, 2.weight" in message


def test_another_size_is_told_by_both_shapes() -> None:
    message = difference(build(), build(width=6))
    assert message is not None
    assert "0.weight: [8, 8] in the file, [6, 8] here" in message


def test_renamed_parameters_are_told_by_both_names() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4)})
    other = nn.ModuleDict({"b": nn.Linear(4, 4)})
    for module in (net, other):
        inject_adapters(module, LoRAConfig(rank=2))
    message = difference(net, other)
    assert message is not None
    assert "only in the file: a.bias, a.weight" in message
    assert "only in the module: b.bias, b.weight" in message


def test_a_change_of_a_sampled_element_is_seen() -> None:
    net, other = build(), build()
    with torch.no_grad():
        other.get_parameter("0.weight").view(-1)[0] += 1e-6
    message = difference(net, other)
    assert message is not None
    assert "the values of 1 of 6 parameters differ: 0.weight" in message


def test_a_training_step_on_the_base_is_seen() -> None:
    net, other = build(), build()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora" not in name:
                parameter.sub_(1e-5 * torch.ones_like(parameter))
    assert difference(net, other) is not None


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_precision_is_known_again(cast: torch.dtype) -> None:
    assert difference(build(), build().to(cast)) is None
    assert difference(build().to(cast), build()) is None


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_another_base_in_another_precision_is_not(cast: torch.dtype) -> None:
    assert difference(build(), build(seed=1).to(cast)) is not None


def test_nan_in_both_bases_is_no_difference() -> None:
    net = build()
    with torch.no_grad():
        net.get_parameter("0.weight").fill_(float("nan"))
    assert difference(net, copy.deepcopy(net)) is None
    assert difference(net, build()) is not None


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2,), (SAMPLES_PER_TENSOR,), (3, 5), (1009, 7)])
def test_tensors_of_any_size_are_sampled(shape: tuple[int, ...]) -> None:
    def with_extra(offset: float) -> nn.Module:
        net = build()
        net.register_parameter("extra", nn.Parameter(torch.zeros(shape) + offset, requires_grad=False))
        return net

    assert is_fingerprint(fingerprint(with_extra(0.0)))
    assert difference(with_extra(0.0), with_extra(0.0)) is None
    told = difference(with_extra(0.0), with_extra(1e-6))
    assert told is None if 0 in shape else told is not None and "extra" in told


def test_order_of_the_parameters_does_not_matter() -> None:
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 6)}
    net, turned = nn.ModuleDict(layers), nn.ModuleDict(dict(reversed(layers.items())))
    inject_adapters(net, LoRAConfig(rank=2))
    found = fingerprint(net)
    remove_adapters(net)
    inject_adapters(turned, LoRAConfig(rank=2))
    assert list(fingerprint(turned)["tensors"]) != list(found["tensors"])
    assert describe_difference(found, fingerprint(turned)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("samples"),
        lambda found: found.update(samples=found["samples"][:-1]),
        lambda found: found.update(samples=found["samples"].reshape(1, -1)),
        lambda found: found.update(samples=found["samples"].tolist()),
        lambda found: found.update(tensors=list(found["tensors"])),
        lambda found: found["tensors"].update({"0.weight": ["float32", 8.0, 8.0]}),
        lambda found: found["tensors"].update({"0.weight": ["float32", -8, -8]}),
        lambda found: found["tensors"].update({"0.weight": ["decimal", 8, 8]}),
        lambda found: found["tensors"].update({"0.weight": [["float32"], 8, 8]}),
        lambda found: found["tensors"].update({"0.weight": []}),
        lambda found: found["tensors"].update({"0.weight": 8}),
        lambda found: found.update(tensors=dict(enumerate(found["tensors"].values()))),
        lambda found: found.update(samples=found["samples"].to(torch.complex64)),
    ],
)
def test_a_damaged_fingerprint_is_told_from_a_right_one(damage: Callable[[dict[str, Any]], object]) -> None:
    found = fingerprint(build())
    assert is_fingerprint(found)
    damage(found)
    assert not is_fingerprint(found)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager")], ids=["torch.compile"])
def test_a_compiled_part_has_the_fingerprint_of_the_plain_one(wrap: Callable[[nn.Module], Any]) -> None:
    plain, compiled = nn.ModuleDict({"part": nn.Linear(4, 4)}), nn.ModuleDict()
    compiled["part"] = wrap(copy.deepcopy(plain["part"]))
    for module in (plain, compiled):
        inject_adapters(module, LoRAConfig(rank=2))
    assert difference(plain, compiled) is None


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("size", [7, 8, 9, 15, 104, 1664])
def test_the_first_and_the_last_value_of_a_tensor_are_looked_at(size: int, index: int) -> None:
    def with_extra(offset: float) -> nn.Module:
        net, values = build(), torch.zeros(size)
        values[index] += offset
        net.register_parameter("extra", nn.Parameter(values, requires_grad=False))
        return net

    assert difference(with_extra(0.0), with_extra(0.0)) is None
    assert "extra" in str(difference(with_extra(0.0), with_extra(1.0)))


def test_a_complex_parameter_is_looked_at_in_both_of_its_parts() -> None:
    def with_extra(value: complex) -> nn.Module:
        net = build()
        net.register_parameter("extra", nn.Parameter(torch.full((9,), value), requires_grad=False))
        return net

    assert difference(with_extra(1j), with_extra(1j)) is None
    assert "extra" in str(difference(with_extra(1j), with_extra(2j)))
