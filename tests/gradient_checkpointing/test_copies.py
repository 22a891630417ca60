"""Nothing of the user's is renamed, and taking it away leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, remove_adapters
from lightning_lora.gradient_checkpointing import (
    GradientCheckpointingConfig,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    recomputed_blocks,
)
from tests.gradient_checkpointing.cases import CASES, Block, assert_same, build, gradients, recomputations, rows, stack

NAMES = ["stack", "llama", "encoder", "resnet"]


def _everything(module: nn.Module) -> dict[str, Any]:
    return {
        name: (type(child), {key: (id(v) if key == "forward" else None) for key, v in vars(child).items()})
        for name, child in module.named_modules(remove_duplicate=False)
    }


@pytest.mark.parametrize("name", NAMES)
def test_keys_names_and_classes_stay_and_disabling_leaves_no_trace(name: str) -> None:
    module = build(name)
    before, keys = _everything(module), list(module.state_dict())
    parameters = [key for key, _ in module.named_parameters()]
    enable_gradient_checkpointing(module)
    assert list(module.state_dict()) == keys
    assert [key for key, _ in module.named_parameters()] == parameters
    assert {path: kind for path, (kind, _) in _everything(module).items()} == {p: k for p, (k, _) in before.items()}
    disable_gradient_checkpointing(module)
    assert _everything(module) == before
    disable_gradient_checkpointing(module)
    assert _everything(module) == before


def test_enabling_again_changes_nothing_and_another_config_replaces_the_first() -> None:
    module = stack()
    for _ in range(2):
        enable_gradient_checkpointing(module)
        assert recomputations(module, rows()) == dict.fromkeys("1234", 1)
    enable_gradient_checkpointing(module, GradientCheckpointingConfig(every_n=2))
    assert recomputations(module, rows(), list("1234")) == dict.fromkeys("13", 1)
    enable_gradient_checkpointing(module, GradientCheckpointingConfig(blocks="4", offload=True))
    assert recomputations(module, rows(), list("1234")) == {"4": 1}
    disable_gradient_checkpointing(module)
    assert "forward" not in vars(module[3])  # type: ignore[index]


def test_a_forward_of_the_users_own_on_a_block_is_called_and_comes_back() -> None:
    module, block = stack(), Block()
    own = block.forward
    module[2].forward = own  # type: ignore[index, method-assign]
    twin = copy.deepcopy(module)
    expected = gradients(module, rows())
    enable_gradient_checkpointing(module)
    assert_same(gradients(module, rows()), expected)
    disable_gradient_checkpointing(module)
    assert vars(module[2])["forward"] is own  # type: ignore[index]
    del twin


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_work_on_their_own(name: str) -> None:
    module, inputs = build(name), CASES[name].inputs()
    enable_gradient_checkpointing(module)
    start = copy.deepcopy(module.state_dict())
    expected, blocks = gradients(module, inputs), recomputed_blocks(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), _saved(module)):
        twin.load_state_dict(start)
        assert recomputed_blocks(twin) == blocks
        assert_same(gradients(twin, inputs), expected)
        assert recomputations(twin, inputs) == dict.fromkeys(blocks, 1)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        module.load_state_dict(start)
        assert_same(gradients(module, inputs), expected)


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_adapters_may_come_and_go_meanwhile() -> None:
    module = stack()
    enable_gradient_checkpointing(module)
    inject_adapters(module, LoRAConfig(rank=2))
    assert recomputations(module, rows()) == dict.fromkeys("1234", 1)
    remove_adapters(module)
    assert recomputations(module, rows()) == dict.fromkeys("1234", 1)
