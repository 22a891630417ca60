"""The benchmark of what follows the backward pass: every variant takes the same steps."""

from __future__ import annotations

import torch

from benchmarks import optimizer


def test_the_shapes_are_those_of_all_pairs_of_a_model() -> None:
    assert len(optimizer.adapter_shapes("smollm2-135m", 16)) == 420
    assert optimizer.adapter_shapes("tiny", 3)[:2] == [(3, 32), (32, 3)]


def test_all_variants_come_to_the_same_values() -> None:
    row = optimizer.measure("tiny", rank=2, rounds=2)
    assert row["tensors"] == 28
    assert set(row["after_backward"]) == set(row["with_backward"]) == {"foreach", "fused", "flat"}


def test_the_flat_variant_steps_one_tensor() -> None:
    variant = optimizer.build_flat([(2, 3), (4, 2)])
    before = [parameter.detach().clone() for parameter in variant.parameters]
    variant.step()
    assert [p.numel() for group in variant.optimizer.param_groups for p in group["params"]] == [14]
    assert not any(torch.equal(a, b) for a, b in zip(variant.parameters, before, strict=True))
