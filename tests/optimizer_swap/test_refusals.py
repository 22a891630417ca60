"""What can't be swapped without a change of meaning is refused, with what to do, and nothing is changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import Lion8bit
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from lightning_lora import MissingDependencyError, UnsupportedSetupError
from tests.optimizer_swap.runs import Net, fit, swap


class OwnStep(torch.optim.AdamW):
    """A user's AdamW that does more."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)


def stepped(optimizer: Optimizer) -> Optimizer:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def with_own_step(optimizer: Optimizer) -> Optimizer:
    original = optimizer.step
    optimizer.step = lambda closure=None: original(closure)  # type: ignore[method-assign]
    return optimizer


def with_scheduled_own_step(optimizer: Optimizer) -> Optimizer:
    optimizer.step = OwnStep.step.__get__(optimizer)  # type: ignore[method-assign]
    StepLR(optimizer, 1)
    return optimizer


def with_hook(optimizer: Optimizer) -> Optimizer:
    optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    return optimizer


Make = Callable[[list[nn.Parameter]], Optimizer]
NO_FAMILY = "it is neither torch.optim.Adam nor AdamW. Return one of these from configure_optimizers"
CASES: dict[str, tuple[Make, str]] = {
    "SGD": (lambda p: torch.optim.SGD(p), NO_FAMILY),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), NO_FAMILY),
    "LBFGS": (lambda p: torch.optim.LBFGS(p), NO_FAMILY),
    "NAdam": (lambda p: torch.optim.NAdam(p), NO_FAMILY),
    "another of bitsandbytes": (
        lambda p: Lion8bit(p),
        "it is already bitsandbytes'. Return torch.optim.AdamW from configure_optimizers",
    ),
    "own step": (lambda p: OwnStep(p), "it has its own step, zero_grad, which would be lost. Return torch's AdamW"),
    "replaced step": (lambda p: with_own_step(torch.optim.AdamW(p)), "it has its own step, which would be lost"),
    "replaced and wrapped step": (
        lambda p: with_scheduled_own_step(torch.optim.AdamW(p)),
        "it has its own step, which would be lost",
    ),
    "decay in the gradient": (
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        "its weight_decay=0.1 is added to the gradient.*Return torch.optim.AdamW or use weight_decay=0",
    ),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "bitsandbytes has no amsgrad=True. Return an optimizer"),
    "maximize": (lambda p: torch.optim.AdamW(p, maximize=True), "bitsandbytes has no maximize=True"),
    "differentiable": (lambda p: torch.optim.AdamW(p, differentiable=True), "bitsandbytes has no differentiable=True"),
    "capturable": (lambda p: torch.optim.AdamW(p, capturable=True), "bitsandbytes has no capturable=True"),
    "state": (lambda p: stepped(torch.optim.AdamW(p)), "it has taken steps already.*Return a new optimizer"),
    "hook": (
        lambda p: with_hook(torch.optim.AdamW(p)),
        "bitsandbytes calls no hooks of load_state_dict, and it has some",
    ),
    "double": (
        lambda p: torch.optim.AdamW([nn.Parameter(p[0].double())]),
        "bitsandbytes computes in fp32, and its parameters are wider. Use another precision than 64-true",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_can_not_be_swapped_is_refused_and_stays_as_it_is(case: str) -> None:
    make, message = CASES[case]
    optimizer, before = make([nn.Parameter(torch.ones(4))]), torch.optim.AdamW([nn.Parameter(torch.ones(4))])
    kind, settings = type(optimizer), dict(optimizer.param_groups[0])
    with pytest.raises(
        UnsupportedSetupError, match=rf"optimizer 1 \({kind.__name__}\): {message}.*leave optimizer= out"
    ):
        swap(before, optimizer)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0] == settings
    assert type(before) is torch.optim.AdamW


@pytest.mark.parametrize("case", ["SGD", "decay in the gradient"])
def test_torchs_adamw_takes_only_the_place_of_what_it_equals(case: str) -> None:
    make, message = CASES[case]
    with pytest.raises(UnsupportedSetupError, match=message):
        swap(make([nn.Parameter(torch.ones(4))]), kind="adamw")


@pytest.mark.parametrize("case", ["amsgrad", "maximize", "state", "hook", "double"])
def test_torchs_adamw_keeps_what_bitsandbytes_lacks(case: str) -> None:
    optimizer = CASES[case][0]([nn.Parameter(torch.ones(4))])
    settings = dict(optimizer.param_groups[0])
    swap(optimizer, kind="adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0] == settings


def test_a_run_is_refused_before_its_first_step(tmp_path: Path) -> None:
    class Plain(Net):
        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    with pytest.raises(UnsupportedSetupError, match=r"can't take the place of optimizer 0 \(SGD\)"):
        fit(tmp_path, module, "adamw8bit")
    assert not module.settings


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit", "paged_adamw"])
def test_without_bitsandbytes_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "lightning_lora.optimizer_swap.classes", raising=False)
    monkeypatch.delattr("lightning_lora.optimizer_swap.classes", raising=False)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    pattern = rf'optimizer="{kind}" needs bitsandbytes .*: pip install \'lightning-lora\[qlora\]\''
    with pytest.raises(MissingDependencyError, match=pattern):
        swap(torch.optim.AdamW([nn.Parameter(torch.ones(4))]), kind=kind)


def test_without_bitsandbytes_torchs_adamw_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(4))])
    swap(optimizer, kind="adamw")
    assert type(optimizer) is torch.optim.AdamW
