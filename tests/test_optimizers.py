"""Optimizers keep what trains, and a run that would train nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora import AdapterMismatchError, CheckpointError, LoRAConfig, UnsupportedSetupError, inject_adapters
from lightning_lora.optimizers import fuse_adamw, prune_frozen, require_matching_state, require_trainable

KINDS = [
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adafactor,
    torch.optim.LBFGS,
]


@pytest.fixture
def net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inject_adapters(net, LoRAConfig(rank=2, target_modules="0"))
    return net


def held(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_leave_and_trained_ones_stay_in_order(net: nn.Module, kind: type[Optimizer]) -> None:
    optimizer = kind(net.parameters(), lr=0.1)
    assert prune_frozen([optimizer]) == 4
    assert held(optimizer) == [id(p) for p in net.parameters() if p.requires_grad]
    assert prune_frozen([optimizer]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_optimizer_trains_the_adapters_and_nothing_else(net: nn.Module, kind: type[Optimizer]) -> None:
    optimizer = kind(net.parameters(), lr=0.01)
    prune_frozen([optimizer])
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in net.named_parameters()}

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(inputs).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        closure()
        optimizer.step(closure)  # type: ignore[arg-type]
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_of_a_frozen_parameter_is_left_for_a_checkpoint(net: nn.Module, kind: type[Optimizer]) -> None:
    optimizer = kind(net.parameters(), lr=0.1)
    prune_frozen([optimizer])
    state = optimizer.state_dict()
    assert len(state["state"]) <= 2
    assert [len(group["params"]) for group in state["param_groups"]] == [2]


def test_groups_stay_when_they_become_empty(net: nn.Sequential) -> None:
    optimizer = torch.optim.AdamW([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 1.0}])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=3)
    assert prune_frozen([optimizer]) == 4
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()


def test_names_of_parameters_are_pruned_with_them(net: nn.Module) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    prune_frozen([optimizer])
    assert optimizer.param_groups[0]["param_names"] == ["0.adapters.default.lora_A", "0.adapters.default.lora_B"]


def test_the_list_itself_is_changed_because_others_hold_on_to_it(net: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(net.parameters())
    prune_frozen([optimizer])
    assert optimizer._params is optimizer.param_groups[0]["params"]


def test_a_trainable_parameter_outside_all_optimizers_is_refused_by_name(net: nn.Sequential) -> None:
    lora_A = net.get_parameter("0.adapters.default.lora_A")
    with pytest.raises(
        UnsupportedSetupError, match=r"1 trainable parameters are in no optimizer.*'0\.adapters\.default\.lora_B'.*self"
    ):
        require_trainable(net, [torch.optim.SGD([lora_A], lr=0.1)])
    with pytest.raises(UnsupportedSetupError, match="2 trainable parameters"):
        require_trainable(net, [torch.optim.SGD(net[2].parameters(), lr=0.1)])


def test_parameters_may_be_spread_over_optimizers(net: nn.Module) -> None:
    adapters = [p for p in net.parameters() if p.requires_grad]
    require_trainable(net, [torch.optim.SGD([p], lr=0.1) for p in adapters])


def checkpoint_of(*optimizers: Optimizer, names: bool = True) -> dict[str, Any]:
    kinds = {"optimizers": [type(optimizer).__name__ for optimizer in optimizers]} if names else {}
    return {"optimizer_states": [o.state_dict() for o in optimizers], "lightning_lora": kinds}


def test_the_state_of_the_same_optimizers_is_accepted(net: nn.Module) -> None:
    optimizers = [torch.optim.AdamW([p]) for p in net.parameters() if p.requires_grad]
    require_matching_state(optimizers, checkpoint_of(*optimizers))
    require_matching_state(optimizers, checkpoint_of(*optimizers, names=False))  # of before the names were noted


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda p: [torch.optim.SGD(p, lr=1)], r"is of SGD, the optimizer here is AdamW"),
        (lambda p: [torch.optim.AdamW(p), torch.optim.AdamW(p)], r"the state of 2 optimizers, the module configures 1"),
        (lambda p: [], r"the state of 0 optimizers, the module configures 1"),
        (lambda p: [torch.optim.AdamW(p[:1])], r"belongs to \[1\] parameters by group, the optimizer here holds \[2\]"),
        (
            lambda p: [torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:]}])],
            r"belongs to \[1, 1\] parameters by group, the optimizer here holds \[2\]",
        ),
    ],
)
def test_the_state_of_others_is_refused_with_both_sides(net: nn.Module, other: Any, message: str) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    with pytest.raises(AdapterMismatchError, match=message):
        require_matching_state([torch.optim.AdamW(parameters)], checkpoint_of(*other(parameters)))


def test_a_checkpoint_without_optimizer_state_is_refused(net: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"holds only weights .*load_from_checkpoint and fit without ckpt_path"):
        require_matching_state([torch.optim.AdamW(net.parameters())], {"state_dict": {}})


def stepped(
    kind: type[Optimizer], *, fuse: bool, steps: int = 5, **options: Any
) -> tuple[Optimizer, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 5, generator=generator)) for _ in range(4)]
    optimizer = kind(parameters, lr=0.05, weight_decay=0.1, **options)
    for step in range(steps):
        if fuse and step == 2:  # in the midst of a run, as after a resume
            fuse_adamw([optimizer])
        for parameter in parameters:
            parameter.grad = torch.randn(3, 5, generator=generator)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_one_kernel_updates_as_the_loop_over_tensors_does(kind: type[Optimizer]) -> None:
    loop, expected = stepped(kind, fuse=False)
    fused, found = stepped(kind, fuse=True)
    assert not loop.param_groups[0]["fused"]
    assert fused.param_groups[0]["fused"]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"fused": False}, {"capturable": True}, {"lr": torch.tensor(0.05)}], ids=str
)
def test_how_the_user_chose_to_update_stays(options: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], **options)
    before = dict(optimizer.param_groups[0])
    fuse_adamw([optimizer])
    assert optimizer.param_groups[0] == before


def test_optimizers_of_other_classes_are_left_alone() -> None:
    class Own(torch.optim.AdamW):
        pass

    for optimizer in (Own([nn.Parameter(torch.ones(2))]), torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)):
        fuse_adamw([optimizer])
        assert not optimizer.param_groups[0].get("fused")
