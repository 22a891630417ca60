"""Hazard: a deep copy or a pickle of an adapted, patched module that still uses the original."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, MergeError, inject_adapters, merge_adapters, remove_adapters, unmerge_adapters
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, trained
from tests.states import adapters_of, base_of, read, same


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = [copy.deepcopy, pickled, saved]


@pytest.fixture
def module(make_trainer: Any) -> TinyModule:
    found = TinyModule()
    fit(make_trainer(callbacks=[lora()]), found)
    found.trainer = None
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_the_same_outputs_and_its_own_tensors(module: TinyModule, way: Any) -> None:
    other = way(module)
    x = torch.randn(3, WIDTH)
    assert torch.equal(other(x), module(x))
    before = module.state_dict()["backbone.0.adapters.default.lora_B"].clone()
    with torch.no_grad():
        for key, value in other.state_dict().items():
            if ".lora_" in key:
                value.fill_(1.0)
    assert torch.equal(module.state_dict()["backbone.0.adapters.default.lora_B"], before)
    assert not torch.allclose(other(x), module(x))
    assert not {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_trains_and_the_original_stays(make_trainer: Any, module: TinyModule, way: Any) -> None:
    other, before = way(module), adapters_of(module)
    fit(make_trainer(callbacks=[lora()]), other)
    assert same(adapters_of(module), before)
    assert not same(adapters_of(other), before)


@pytest.mark.parametrize("way", WAYS)
def test_the_patches_of_a_copy_save_and_load_the_copy(
    make_trainer: Any, module: TinyModule, tmp_path: Path, way: Any
) -> None:
    other = way(module)
    with torch.no_grad():
        other.backbone[0].adapters["default"].lora_B.fill_(3.0)
    trainer = make_trainer(callbacks=[lora()])
    trainer.validate(other, make_loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "copy.ckpt")
    assert is_adapter_only(tmp_path / "copy.ckpt")
    assert bool((read(tmp_path / "copy.ckpt")["state_dict"]["backbone.0.adapters.default.lora_B"] == 3.0).all())
    back = way(module)
    trainer.validate(back, make_loader(), ckpt_path=tmp_path / "copy.ckpt", verbose=False)
    assert same(adapters_of(back), adapters_of(other))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_made_during_the_run_is_bound_to_itself(make_trainer: Any, way: Any) -> None:
    copies: list[TinyModule] = []

    class Copying(TinyModule):
        def on_train_start(self) -> None:
            trainer, self.trainer = self.trainer, None
            copies.append(copy.deepcopy(self) if way is copy.deepcopy else pickled_locally(self))
            self.trainer = trainer

    def pickled_locally(found: TinyModule) -> Any:
        return pickle.loads(pickle.dumps(found.backbone))

    module = Copying()
    fit(make_trainer(callbacks=[lora()]), module)
    (taken,) = copies
    assert trained(module)
    assert not trained(taken)
    for function in [value for value in vars(taken).values() if hasattr(value, "func") and hasattr(value, "args")]:
        assert function.args[0] is taken


@pytest.mark.parametrize("way", WAYS)
def test_removing_the_adapters_of_a_copy_leaves_the_original_adapted(module: TinyModule, way: Any) -> None:
    other = way(module)
    remove_adapters(other)
    assert type(other.backbone[0]) is nn.Linear
    assert not adapters_of(other)
    assert trained(module)
    assert same(other.state_dict(), TinyModule().state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_merging_a_copy_leaves_the_original_adapted(module: TinyModule, way: Any) -> None:
    other, x = way(module), torch.randn(3, WIDTH)
    before = module(x)
    merge_adapters(other)
    assert torch.equal(module(x), before)
    torch.testing.assert_close(other(x), before)
    unmerge_adapters(other)
    assert same(other.state_dict(), module.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_merged_module_is_a_plain_module(module: TinyModule, way: Any) -> None:
    merge_adapters(module)
    other, x = way(module), torch.randn(3, WIDTH)
    assert torch.equal(other(x), module(x))
    assert same(base_of(other), base_of(module))
    with pytest.raises(MergeError, match="copy of a merged one and has no base weights to go back to"):
        unmerge_adapters(other)
    unmerge_adapters(module)
    assert trained(module)


def test_a_copy_of_a_submodule_is_independent() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapters(net, LoRAConfig(rank=1))
    other = copy.deepcopy(net[0])
    nn.init.ones_(other.adapters["default"].lora_B)
    assert bool((net[0].adapters["default"].lora_B == 0).all())
    assert isinstance(other, nn.Linear)


def test_the_callback_itself_is_copied_and_pickled_before_and_after_a_run(make_trainer: Any) -> None:
    callback = lora(merge=True)
    for _ in range(2):
        for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert other.config == callback.config
            assert other.merge_config == callback.merge_config
        fit(make_trainer(callbacks=[callback]), TinyModule())
