"""Counting storages agrees with what torch's allocator reports to the profiler."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from lightning_lora.planning.liveness import LiveBytes

KIB = 1024
# The profiler sees the few scalars that operators take inside themselves.
SCALARS = 512


def counted(step, known=()):
    with LiveBytes(known) as live:
        step()
    return live


def test_a_storage_counts_until_its_last_view_is_gone():
    with LiveBytes() as live:
        whole = torch.empty(KIB)
        part = whole[:10]
        del whole
        assert live.total == 4 * KIB
        del part
        assert live.total == 0
    assert live.peak == 4 * KIB


def test_known_tensors_and_their_views_never_count():
    weight = torch.ones(KIB)
    assert counted(lambda: weight.view(32, 32).t(), [weight]).peak == 0


def test_a_storage_counts_as_the_part_that_it_was_given_last():
    with LiveBytes() as live:
        live.part = "first"
        tensor = torch.empty(KIB)
        live.part = "second"
        other = torch.empty(KIB)
        live.count(tensor, "third")
        assert live.current["first"] == 0
        assert live.take_peak() == {"third": 4 * KIB, "second": 4 * KIB}
        del other
    assert live.take_peak() == {"third": 4 * KIB, "second": 4 * KIB}


def residual(width=64, depth=4):
    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
    )
    return layers, [parameter for layer in layers for parameter in layer.parameters()]


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_of_a_residual_network_peak_where_the_allocator_says(recompute):
    layers, parameters = residual()
    batch = torch.randn(256, 64)

    def step():
        hidden = batch
        for layer in layers:
            branch = checkpoint(layer, hidden, use_reentrant=False) if recompute else layer(hidden)
            hidden = hidden + branch
        hidden.square().mean().backward()

    step()
    for parameter in parameters:
        parameter.grad = None
    measured = peak_bytes(step)
    for parameter in parameters:
        parameter.grad = None
    assert counted(step, [*parameters, batch]).peak == pytest.approx(measured, rel=0.01)


def test_gradients_that_add_up_reuse_the_first_ones_memory():
    """Under a dispatch mode the engine adds out of place; without one it does not."""
    leaf = torch.ones(256 * KIB, requires_grad=True)

    def step():
        left, right = leaf * 2, leaf * 3
        (left + right).sum().backward()

    step()
    leaf.grad = None
    measured = peak_bytes(step)
    leaf.grad = None
    assert counted(step, [leaf]).peak == pytest.approx(measured, abs=SCALARS)
