"""What every adapter keeps: its precision under casts, and the right to be absent from a base file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.adapter import Adapter


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(8, 8, dtype=dtype), "b": nn.Linear(8, 8, dtype=dtype)})
    inject_adapters(net, LoRAConfig(rank=2))
    for adapter in adapters(net):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    return net


def adapters(net: nn.Module) -> list[Adapter]:
    return [child for child in net.modules() if isinstance(child, Adapter)]


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items() if "lora_" in key}


CASTS: list[Callable[[nn.Module], Any]] = [
    lambda net: net.to(torch.bfloat16),
    lambda net: net.half(),
    lambda net: net.bfloat16(),
    lambda net: net.to(dtype=torch.float16),
]


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_to_half_precision_leaves_the_adapters_bit_for_bit(cast: Callable[[nn.Module], Any]) -> None:
    net = adapted()
    before = values(net)
    cast(net)
    assert net.get_submodule("a").weight.dtype.itemsize == 2  # type: ignore[union-attr]
    for key, value in values(net).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])


def test_bf16_true_conversion_keeps_what_a_resume_restored() -> None:
    net = adapted()
    before = values(net)
    HalfPrecision("bf16-true").convert_module(net)
    assert all(torch.equal(value, before[key]) for key, value in values(net).items())
    assert net.get_submodule("a").weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_double_raises_the_adapters_with_the_base() -> None:
    net = adapted(torch.bfloat16).double()
    assert {value.dtype for value in values(net).values()} == {torch.float64}


def test_gradients_keep_their_precision_too() -> None:
    net = adapted()
    net.get_submodule("a")(torch.randn(3, 8)).sum().backward()
    adapter = adapters(net)[0]
    before = {key: p.grad.clone() for key, p in adapter.named_parameters() if p.grad is not None}
    assert before
    net.half()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[key])


def test_casting_keeps_the_same_parameter_objects_for_the_optimizer() -> None:
    net = adapted()
    before = [id(p) for adapter in adapters(net) for p in adapter.parameters()]
    net.to(torch.bfloat16)
    assert [id(p) for adapter in adapters(net) for p in adapter.parameters()] == before


def test_moving_to_another_device_moves_the_adapters() -> None:
    net = adapted().to(device="meta", dtype=torch.bfloat16)
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}
    assert {net.state_dict()[key].dtype for key in values(adapted())} == {torch.float32}


def test_base_weights_load_strictly_after_the_injection() -> None:
    torch.manual_seed(1)
    base = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    net = adapted()
    before = values(net)
    net.load_state_dict(base.state_dict(), strict=True)
    assert torch.equal(net.get_submodule("a").weight, base["a"].weight)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in values(net).items())


def test_one_missing_tensor_of_an_adapter_fails_a_strict_load() -> None:
    net = adapted()
    state = net.state_dict()
    del state["a.adapters.default.lora_B"]
    with pytest.raises(RuntimeError, match=r"Missing key.*a\.adapters\.default\.lora_B"):
        net.load_state_dict(state, strict=True)


def test_an_unknown_adapter_tensor_fails_a_strict_load() -> None:
    net = adapted()
    state = {**net.state_dict(), "a.adapters.other.lora_A": torch.zeros(2, 8)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict(state, strict=True)


def test_a_full_state_dict_makes_the_round_trip() -> None:
    net, other = adapted(), adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in other.state_dict().items())
