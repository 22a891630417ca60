"""The note that an injection leaves on a module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, MergeError, inject_adapters, merge_adapters, remove_adapters, unmerge_adapters
from lightning_lora.record import Record, drop_record, find_nested_record, find_record, store_record


@pytest.fixture
def net() -> nn.Module:
    return nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})


def test_it_is_found_on_the_module_it_was_stored_on_and_nowhere_else(net: nn.Module) -> None:
    record = Record()
    assert find_record(net) is None
    store_record(net, record)
    assert find_record(net) is record
    assert find_record(net.get_submodule("part")) is None
    drop_record(net)
    drop_record(net)
    assert find_record(net) is None


def test_one_further_down_is_found_by_name(net: nn.Module) -> None:
    store_record(net, Record())
    assert find_nested_record(net) is None
    store_record(net.get_submodule("part"), Record())
    assert find_nested_record(net) == "part"


def test_it_shows_in_no_parameter_buffer_or_module_and_in_no_state_dict(net: nn.Module) -> None:
    names = [name for name, _ in net.named_modules()]
    keys = list(net.state_dict())
    store_record(net, Record(saved=["part.0.weight"]))
    assert [name for name, _ in net.named_modules()] == names
    assert list(net.state_dict()) == keys


def test_it_goes_with_a_copy_and_is_independent_there(net: nn.Module) -> None:
    inject_adapters(net, LoRAConfig(rank=2))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        record = find_record(twin)
        assert record is not None
        assert record is not find_record(net)
        assert record.configs == {"default": LoRAConfig(rank=2)}
        remove_adapters(twin)
    assert find_record(net) is not None


def test_something_else_of_that_name_is_no_record(net: nn.Module) -> None:
    net.__dict__["_lightning_lora"] = "mine"
    assert find_record(net) is None


def test_a_copy_of_a_merged_module_is_plain_and_cannot_be_unmerged(net: nn.Module) -> None:
    inject_adapters(net, LoRAConfig(rank=2))
    merge_adapters(net)
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin["part"](x), net["part"](x))  # type: ignore[index, operator]
        with pytest.raises(MergeError, match=r"copy of a merged one .*Build the module anew, or call remove_adapters"):
            unmerge_adapters(twin)
        remove_adapters(twin)
        inject_adapters(twin, LoRAConfig(rank=2))
    unmerge_adapters(net)
