"""Hazard: an injection that draws from the global random stream changes every experiment that it is added to."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from lightning_lora import LoRAConfig, inject_adapters
from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import fit, lora
from tests.states import adapters_of, same


def draws() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def test_an_injection_leaves_the_random_streams_where_they_were() -> None:
    seed()
    expected = draws()
    module = TinyModule()
    seed()
    inject_adapters(module, LoRAConfig(rank=2))
    assert draws() == expected


def test_a_run_with_the_callback_draws_what_a_run_without_it_draws(make_trainer: Any) -> None:
    class Recording(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.drawn.append(float(torch.rand(())))
            self.seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    def run(callbacks: list[Any]) -> tuple[list[float], list[torch.Tensor], list[float]]:
        seed()
        module = Recording(dropout=0.5)
        module.drawn, module.seen = [], []
        loader = make_loader(shuffle=True)
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module, loader, make_loader())
        return module.drawn, module.seen, draws()

    plain, adapted, merged = run([]), run([lora()]), run([lora(merge=True)])
    for other in (adapted, merged):
        assert other[0] == plain[0]
        assert all(torch.equal(a, b) for a, b in zip(other[1], plain[1], strict=True))
        assert other[2] == plain[2]


def test_the_start_does_not_depend_on_the_global_seed(make_trainer: Any) -> None:
    found = []
    for number in (0, 123):
        torch.manual_seed(number)
        module = TinyModule()
        fit(make_trainer(max_epochs=0, callbacks=[lora()]), module)
        found.append(adapters_of(module))
    assert same(*found)


def test_the_start_depends_on_the_seed_of_the_config() -> None:
    found = []
    for number in (0, 1):
        module = TinyModule()
        inject_adapters(module, LoRAConfig(rank=2, seed=number))
        found.append(adapters_of(module))
    assert not same(*found)
