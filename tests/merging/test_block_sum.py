"""A merged weight, and the norms that prove it, are the same in blocks of rows as in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import alive_bytes, peak_bytes
from lightning_lora import LoRAConfig, MergeConfig, inject_adapters, merge_adapters
from lightning_lora.layers import update_of
from lightning_lora.lora import LoRAAdapter
from lightning_lora.merging import block_sum
from lightning_lora.merging.block_sum import fold_and_measure, fold_in

MIB = 2**20


def weight_and_adapters(rows: int, columns: int, dtype: torch.dtype, count: int = 2):
    """A weight, and adapters that act one after the other."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"rank": 2, "alpha": 4, "scaling": 2.0, "dropout": 0.0, "kernels": "torch", "like": weight}
    adapters = [LoRAAdapter(rows, columns, **options) for _ in range(count)]
    draw(*adapters)
    return weight, adapters


def draw(*modules: nn.Module) -> None:
    """Values for every A and B."""
    drawn = torch.Generator().manual_seed(1)
    for module in modules:
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1, generator=drawn)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (1, 40), (40, 1), (33, 16)], ids=str)
def test_blocks_give_what_the_whole_gives(shape, dtype, stored, transposed, monkeypatch):
    base, adapters = weight_and_adapters(*shape, dtype)
    base = base.t().contiguous().t() if transposed else base
    monkeypatch.setattr(block_sum, "_BLOCK", 32)
    found = fold_and_measure(adapters, base, stored)
    exact = base.to(torch.promote_types(torch.float32, dtype))
    update = update_of(adapters, exact)
    expected = (exact + update).to(stored)
    assert found.stored.dtype == stored and found.stored.stride() == base.stride() and found.is_finite
    torch.testing.assert_close(found.stored, expected)
    assert torch.equal(fold_in(adapters, base, stored), found.stored)  # what is proved is what is written
    error = (found.stored.to(exact.dtype) - exact).sub_(update)
    for got, wanted in ((found.weight, exact), (found.update, update), (found.error, error)):
        assert got == pytest.approx(wanted.norm().item(), rel=1e-4, abs=1e-5)


def test_what_is_stored_instead_is_what_the_error_is_of():
    base, adapters = weight_and_adapters(6, 4, torch.float32)
    other = torch.randn(6, 4)
    found = fold_and_measure(adapters, base, torch.bfloat16, instead=other)
    assert torch.equal(found.stored, other.bfloat16())
    error = found.stored.float() - base - update_of(adapters, base)
    assert found.error == pytest.approx(error.norm().item(), rel=1e-5)


@pytest.mark.parametrize("where", [0, 39])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_shows(value, where, monkeypatch):
    base, adapters = weight_and_adapters(40, 4, torch.float32)
    base[where, 0] = value
    monkeypatch.setattr(block_sum, "_BLOCK", 32)
    assert not fold_and_measure(adapters, base, torch.float32).is_finite


def test_a_weight_without_values_has_nothing_to_fold():
    folded = fold_and_measure([], torch.empty(0, 3), torch.float32)
    assert folded.stored.shape == (0, 3) and (folded.weight, folded.update, folded.error) == (0.0, 0.0, 0.0)


def test_a_merge_for_good_takes_the_memory_of_one_layer():
    """And three blocks: the update, the sum, and its difference from the base."""
    built: list[nn.Module] = []

    def build() -> None:
        built[:] = [nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))]
        inject_adapters(built[0], LoRAConfig(rank=2, target_modules="all-linear"))
        draw(built[0])

    def build_and_merge() -> None:
        build()
        merge_adapters(built[0], MergeConfig(keep_base=False))

    _, model = alive_bytes(build)
    built.clear()
    assert peak_bytes(build_and_merge) - model < (4 + 3) * MIB + MIB / 2
