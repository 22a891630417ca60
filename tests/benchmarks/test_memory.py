"""Bytes that are alive and peaks, of graphs whose bytes can be counted by hand."""

import weakref

import pytest
import torch
from torch import nn

from benchmarks.memory import alive_bytes, peak_bytes

KIB = 1024


def leaf(elements):
    return torch.ones(elements, requires_grad=True)


def test_what_is_alive_after_a_forward_pass_is_what_hooks_see_saved():
    layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    batch, kept = torch.randn(32, 64), {}

    def forward():
        return layers(batch).square().sum()

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in (*layers.parameters(), batch):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    loss, alive = alive_bytes(forward)
    assert alive == sum(storage.nbytes() for storage in kept.values()) + loss.element_size()


def test_what_ends_during_a_forward_pass_is_not_alive_after_it():
    weight, outputs = torch.ones(256, requires_grad=True), []

    def forward():
        output = weight.exp()  # saves its output
        outputs.append(weakref.ref(output))
        torch.empty(64 * KIB)
        return output.sum()

    loss, alive = alive_bytes(forward)
    assert alive == KIB + loss.element_size()
    del loss
    assert outputs[0]() is None


def test_peak_is_the_largest_sum_alive_at_once():
    def step():
        first = torch.empty(1 * KIB, dtype=torch.uint8)
        second = torch.empty(2 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(500, dtype=torch.uint8)
        del second, third
        torch.empty(700, dtype=torch.uint8)

    assert peak_bytes(step) == 3 * KIB


def test_peak_sees_what_an_operator_takes_and_releases_inside():
    """A softmax cross entropy materialises its log probabilities: no Python code ever holds them."""
    logits, labels = torch.zeros(8, 1000), torch.zeros(8, dtype=torch.long)
    assert peak_bytes(lambda: nn.functional.cross_entropy(logits, labels)) >= 8 * 1000 * 4


@pytest.mark.parametrize("elements", [1000, 100_000])
def test_peak_of_a_step_holds_at_least_what_it_saves(elements):
    weight = torch.ones(elements, requires_grad=True)

    def forward():
        return weight.exp().exp().sum()

    loss, alive = alive_bytes(forward)
    saved = alive - loss.element_size()
    assert saved == 2 * 4 * elements
    assert saved <= peak_bytes(lambda: forward().backward()) <= 3 * saved


def test_a_step_without_any_allocation_is_an_error_and_not_a_zero():
    with pytest.raises(RuntimeError, match="no allocation"):
        peak_bytes(lambda: None)
