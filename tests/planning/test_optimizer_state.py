"""The bytes of optimizer states are those of the real optimizers."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lightning_lora import OptimizerConfig
from lightning_lora.optimizer_swap.config import KINDS
from lightning_lora.planning.optimizer_state import OPTIMIZERS, as_optimizer

OPTIMIZER_CLASSES = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((100,), (64, 65), (70, 1000))]


def state_bytes(optimizer, tensors, leave_out=()):
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return sum(
        value.nbytes
        for tensor in tensors
        for key, value in optimizer.state[tensor].items()
        if isinstance(value, torch.Tensor) and key not in leave_out
    )


@pytest.mark.parametrize("name", OPTIMIZER_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_torchs_optimizers(name, dtype):
    tensors = parameters(dtype)
    expected = state_bytes(OPTIMIZER_CLASSES[name](tensors), tensors)
    assert sum(map(OPTIMIZERS[name].state, tensors)) == expected


def test_states_of_the_8_bit_adamw_of_bitsandbytes():
    tensors = parameters()
    expected = state_bytes(bnb.optim.AdamW8bit(tensors, lr=1e-3), tensors, leave_out=("qmap1", "qmap2"))
    for name in ("adamw8bit", "paged_adamw8bit"):
        assert sum(map(OPTIMIZERS[name].state, tensors)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_the_paged_adamw_are_those_of_the_one_without_pages(dtype):
    tensors = parameters(dtype)
    expected = state_bytes(bnb.optim.AdamW(tensors, lr=1e-3), tensors)
    assert sum(map(OPTIMIZERS["paged_adamw"].state, tensors)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_config_is_the_optimizer_of_its_kind(kind):
    assert as_optimizer(OptimizerConfig(kind=kind)) is as_optimizer(kind) is OPTIMIZERS[kind]


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="adamw8bit"):
        as_optimizer("adam")
