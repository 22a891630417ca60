"""Saved-for-backward and peak bytes, on graphs whose bytes can be counted by hand."""

import weakref

import pytest
import torch
from torch import nn

from benchmarks.memory import alive_bytes, peak_bytes, saved_bytes

KIB = 1024


def leaf(elements):
    return torch.ones(elements, requires_grad=True)


def test_a_frozen_linear_saves_nothing_of_its_own_and_a_trained_one_only_its_input():
    layer = nn.Linear(64, 32, bias=False)
    hidden = torch.ones(16, 64, requires_grad=True).exp().detach()

    def forward():
        return layer(hidden.clone())

    assert saved_bytes(forward, exclude=layer.parameters()) == 16 * 64 * 4
    layer.requires_grad_(False)
    assert saved_bytes(forward, exclude=layer.parameters()) == 0


def test_a_storage_saved_by_several_nodes_and_views_counts_once():
    weight = leaf(256)

    def forward():
        shared = weight * 2.0
        return (shared * shared).sum() + (shared.view(16, 16) ** 2).sum()

    assert saved_bytes(forward, exclude=[weight]) == 256 * 4


def test_excluded_tensors_do_not_count_and_the_same_ones_do_without_the_exclusion():
    weight, batch = leaf(256), torch.ones(256)
    assert saved_bytes(lambda: weight * batch, exclude=[batch, weight]) == 0
    assert saved_bytes(lambda: weight * batch, exclude=[weight]) == KIB


def test_addresses_handed_out_again_are_counted_again():
    """A tensor that dies during the forward must not hide a later one at the same address."""
    weight = leaf(256 * KIB)

    def forward():
        for _ in range(8):
            (weight * torch.ones(256 * KIB)).sum()

    assert saved_bytes(forward, exclude=[weight]) == 8 * 1024 * KIB


def test_nothing_that_was_counted_is_kept_alive():
    weight, outputs = leaf(256), []

    def forward():
        output = weight.exp()
        outputs.append(weakref.ref(output))
        return output.sum()

    assert saved_bytes(forward, exclude=[weight]) == KIB
    assert outputs[0]() is None


def test_what_is_alive_after_a_forward_pass_is_what_hooks_see_saved():
    layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    batch = torch.randn(32, 64)

    def forward():
        return layers(batch).square().sum()

    loss, alive = alive_bytes(forward)
    assert alive == saved_bytes(forward, exclude=[*layers.parameters(), batch]) + loss.element_size()


def test_counting_saved_bytes_leaves_gradients_right():
    weight = leaf(8)
    saved_bytes(lambda: (weight**3).sum().backward())
    assert torch.equal(weight.grad, torch.full((8,), 3.0))


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
    weight = leaf(elements)

    def forward():
        return weight.exp().exp().sum()

    saved = saved_bytes(forward, exclude=[weight])
    weight.grad = None
    assert saved == 2 * 4 * elements
    assert saved <= peak_bytes(lambda: forward().backward()) <= 3 * saved


def test_a_step_without_any_allocation_is_an_error_and_not_a_zero():
    with pytest.raises(RuntimeError, match="no allocation"):
        peak_bytes(lambda: None)
