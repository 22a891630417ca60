"""torch.compile: no graph break of ours, the same gradients and buffers, less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora.gradient_checkpointing import enable_gradient_checkpointing
from tests.gradient_checkpointing.cases import CASES, adapt, assert_same, build, gradients, llama, saved_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["stack", "llama", "resnet"])
def test_the_whole_graph_compiles_and_gradients_are_those_without(name: str) -> None:
    # Without dropout: a compiled graph draws its masks in an order of its own.
    made = adapt(llama(layers=1).double()).eval() if name == "llama" else build(name, training=name == "resnet")
    plain = _without_dropout(made)
    module, inputs = copy.deepcopy(plain), CASES[name].inputs()
    enable_gradient_checkpointing(module)
    expected = gradients(plain, inputs)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = {key.removeprefix("_orig_mod."): value for key, value in gradients(compiled, inputs).items()}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert_same(dict(module.named_buffers()), dict(plain.named_buffers()))
    if name == "stack":
        assert saved_bytes(compiled, inputs) < saved_bytes(plain, inputs) / 2


def _without_dropout(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    return module


# torch asks a block's input for its gradient when it compiles that block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_that_are_compiled_one_by_one_are_recomputed() -> None:
    plain = build("stack", training=False)
    module, inputs = copy.deepcopy(plain), CASES["stack"].inputs()
    for child in module:
        child.compile(backend="aot_eager")
    enable_gradient_checkpointing(module)
    found = gradients(module, inputs)
    for key, value in gradients(plain, inputs).items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert saved_bytes(module, inputs) < saved_bytes(plain, inputs)
