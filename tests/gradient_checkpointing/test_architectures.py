"""Real architectures: the same gradients, bitwise, from less memory, in both modes and precisions."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_lora.gradient_checkpointing import disable_gradient_checkpointing, enable_gradient_checkpointing
from tests.gradient_checkpointing.cases import (
    CASES,
    assert_recomputed,
    assert_same,
    build,
    call,
    gradients,
    recomputations,
    saved_bytes,
)

NAMES = sorted(CASES)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
@MODES
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_buffers_are_those_without(name: str, training: bool, autocast: bool) -> None:
    plain = build(name, training=training)
    module = copy.deepcopy(plain)
    enable_gradient_checkpointing(module)
    inputs = CASES[name].inputs()
    expected = gradients(plain, inputs, autocast=autocast)
    found = gradients(module, inputs, autocast=autocast)
    assert any(value is not None and value.abs().max() > 0 for value in expected.values())
    assert_recomputed(found, expected)
    assert_same(dict(module.named_buffers()), dict(plain.named_buffers()))


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_recomputed_once_and_less_is_saved(name: str, training: bool) -> None:
    module, inputs = build(name, training=training), CASES[name].inputs()
    before = saved_bytes(module, inputs)
    report = enable_gradient_checkpointing(module)
    runs = recomputations(module, inputs)
    assert len(report.recomputed) == CASES[name].blocks
    assert runs == dict.fromkeys(report.recomputed, 1)
    assert saved_bytes(module, inputs) < before
    disable_gradient_checkpointing(module)
    assert saved_bytes(module, inputs) == before


@pytest.mark.parametrize("name", NAMES)
def test_outputs_without_gradients_are_those_without(name: str) -> None:
    plain = build(name, training=False)
    module = copy.deepcopy(plain)
    enable_gradient_checkpointing(module)
    with torch.no_grad():
        expected, found = (call(m, CASES[name].inputs()) for m in (plain, module))
    assert str(found) == str(expected)
