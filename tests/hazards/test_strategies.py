"""Hazard: strategies that shard, wrap or train elsewhere: refused by name, or warned of."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_lora import LoRACallback, UnsupportedSetupError
from lightning_lora.guards import check_trainer
from tests.conftest import TinyModule
from tests.hazards.runs import fit, lora
from tests.states import adapters_of


def check(trainer: pl.Trainer, callback: LoRACallback) -> None:
    check_trainer(trainer, callback, kind=LoRACallback, merges=callback.merge_config is not None)


def test_model_parallel_strategy_is_refused(make_trainer: Any) -> None:
    callback = lora()
    trainer = make_trainer(strategy=ModelParallelStrategy(), callbacks=[callback])
    with pytest.raises(UnsupportedSetupError, match=r'ModelParallelStrategy is not supported. Use strategy="auto" or'):
        check(trainer, callback)


@pytest.mark.parametrize("cls", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_need_a_gpu_are_refused(make_trainer: Any, cls: Any) -> None:
    # Neither can be set up without a GPU (and its package), so the object is one that was never initialised.
    callback = lora()
    trainer = make_trainer(callbacks=[callback])
    trainer._accelerator_connector.strategy = cls.__new__(cls)
    with pytest.raises(UnsupportedSetupError, match=f"{cls.__name__} is not supported"):
        check(trainer, callback)


@pytest.mark.parametrize("strategy", ["auto", SingleDeviceStrategy(), DDPStrategy(), "ddp_find_unused_parameters_true"])
def test_one_device_and_ddp_are_accepted(make_trainer: Any, strategy: Any, recwarn: Any) -> None:
    callback = lora()
    check(make_trainer(strategy=strategy, callbacks=[callback]), callback)
    assert not [w for w in recwarn if "lora" in str(w.message).lower()]


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_multiprocessing_launchers_are_warned_of_unless_the_adapters_are_merged(
    make_trainer: Any, strategy: str, recwarn: Any
) -> None:
    merging = lora(merge=True)
    check(make_trainer(strategy=strategy, callbacks=[merging]), merging)
    assert not [w for w in recwarn if "adapters" in str(w.message)]
    callback = lora()
    with pytest.warns(UserWarning, match="the module there stays without adapters. Use the checkpoint, or merge_on"):
        check(make_trainer(strategy=strategy, callbacks=[callback]), callback)


class Exotic(Strategy):
    """A strategy that nobody here knows."""

    is_global_zero, root_device = True, torch.device("cpu")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def model_to_device(self) -> None: ...

    def barrier(self, name: str | None = None) -> None: ...


def test_a_refusal_comes_before_anything_is_adapted(make_trainer: Any) -> None:
    module = TinyModule()
    with pytest.raises(UnsupportedSetupError, match="Exotic is not supported"):
        fit(make_trainer(strategy=Exotic(), callbacks=[lora()]), module)
    assert all(p.requires_grad for p in module.parameters())
    assert not adapters_of(module)
