"""LoRA's config and its adapter: scaling, initialisation, dropout, step 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.layers import AdaptedLayer
from lightning_lora.lora import LoRAAdapter


def adapter_of(layer: nn.Module, config: LoRAConfig, name: str = "layer") -> LoRAAdapter:
    root = nn.ModuleDict({name: layer})
    inject_adapters(root, config)
    assert isinstance(layer, AdaptedLayer)
    adapter = layer.adapter("default")
    assert isinstance(adapter, LoRAAdapter)
    return adapter


def test_scaling_is_alpha_over_rank() -> None:
    assert adapter_of(nn.Linear(8, 8), LoRAConfig(rank=4, alpha=10)).scaling == 2.5


def test_rank_stabilised_scaling_is_alpha_over_root_of_rank() -> None:
    adapter = adapter_of(nn.Linear(8, 8), LoRAConfig(rank=4, alpha=10, rank_stabilized=True))
    assert adapter.scaling == 5.0


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_scaling_multiplies_the_update_of_the_output(rank_stabilized: bool) -> None:
    layer = nn.Linear(8, 6)
    adapter = adapter_of(layer, LoRAConfig(rank=4, alpha=3, rank_stabilized=rank_stabilized))
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(5, 8)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    wanted = base + (3 / (2 if rank_stabilized else 4)) * x @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(layer(x), wanted)


def test_A_is_random_and_B_is_zero_with_the_shapes_of_the_layer() -> None:
    adapter = adapter_of(nn.Linear(8, 6), LoRAConfig(rank=4))
    assert adapter.lora_A.shape == (4, 8)
    assert adapter.lora_B.shape == (6, 4)
    assert adapter.lora_A.count_nonzero() == adapter.lora_A.numel()
    assert adapter.lora_B.count_nonzero() == 0


def test_kaiming_init_is_uniform_within_one_over_root_of_in_features() -> None:
    A = adapter_of(nn.Linear(1024, 4), LoRAConfig(rank=32, init="kaiming")).lora_A.detach()
    bound = 1 / math.sqrt(1024)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.999 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(A.mean().item()) < 4 * A.std().item() / A.numel() ** 0.5


def test_kaiming_init_is_torch_kaiming_uniform_with_a_root_five() -> None:
    reference = torch.empty(32, 1024)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(1))
    A = adapter_of(nn.Linear(1024, 4), LoRAConfig(rank=32)).lora_A
    assert A.std().item() == pytest.approx(reference.std().item(), rel=0.02)


def test_gaussian_init_has_standard_deviation_one_over_rank() -> None:
    A = adapter_of(nn.Linear(2048, 4), LoRAConfig(rank=16, init="gaussian")).lora_A.detach()
    assert A.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert abs(A.mean().item()) < 4 * A.std().item() / A.numel() ** 0.5


def test_init_depends_on_seed_and_layer_name_only() -> None:
    config = LoRAConfig(rank=2)
    first = adapter_of(nn.Linear(8, 8), config, name="a").lora_A
    torch.manual_seed(12345)
    torch.rand(3)
    assert torch.equal(first, adapter_of(nn.Linear(8, 8), config, name="a").lora_A)
    assert not torch.equal(first, adapter_of(nn.Linear(8, 8), config, name="b").lora_A)
    assert not torch.equal(first, adapter_of(nn.Linear(8, 8), LoRAConfig(rank=2, seed=1), name="a").lora_A)


def test_init_of_a_layer_does_not_depend_on_which_other_layers_are_adapted() -> None:
    def net() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})

    both, one = net(), net()
    inject_adapters(both, LoRAConfig(rank=2))
    inject_adapters(one, LoRAConfig(rank=2, target_modules="b"))
    key = "b.adapters.default.lora_A"
    assert torch.equal(both.state_dict()[key], one.state_dict()[key])


def test_init_is_the_same_for_a_base_of_any_dtype() -> None:
    config = LoRAConfig(rank=2)
    full = adapter_of(nn.Linear(8, 8), config).lora_A
    assert torch.equal(full, adapter_of(nn.Linear(8, 8, dtype=torch.bfloat16), config).lora_A)


def test_injection_leaves_the_random_stream_of_the_user_alone() -> None:
    layer = nn.Linear(8, 8)
    state = torch.get_rng_state()
    adapter_of(layer, LoRAConfig(rank=2, init="gaussian"))
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_made_without_memory_get_the_same_values_with_it() -> None:
    with torch.device("meta"):
        layer = nn.Linear(24, 20)
    adapter = adapter_of(layer, LoRAConfig(rank=4))
    assert adapter.lora_A.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(adapter.lora_A, adapter_of(nn.Linear(24, 20), LoRAConfig(rank=4)).lora_A)
    assert adapter.lora_B.count_nonzero() == 0
    trained = nn.init.ones_(adapter.lora_B).clone()
    layer.to(torch.bfloat16)
    assert torch.equal(adapter.lora_B, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_step_0_outputs_are_bitwise_those_of_the_base(dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 20, dtype=dtype)
    x = torch.randn(7, 24, dtype=dtype)
    before = layer(x)
    adapter_of(layer, LoRAConfig(rank=4, dropout=0.5))
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_outputs_are_bitwise_those_of_the_base_under_autocast(dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 20, dtype=dtype)
    x = torch.randn(7, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        adapter_of(layer, LoRAConfig(rank=4))
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("base", "adapters"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_adapters_are_fp32_at_least_whatever_the_base_is(base: torch.dtype, adapters: torch.dtype) -> None:
    adapter = adapter_of(nn.Linear(8, 8, dtype=base), LoRAConfig(rank=2))
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == adapters


def test_gradients_reach_A_and_B_and_not_the_base() -> None:
    layer = nn.Linear(8, 6, dtype=torch.bfloat16)
    adapter = adapter_of(layer, LoRAConfig(rank=2))
    nn.init.normal_(adapter.lora_B)
    layer(torch.randn(5, 8, dtype=torch.bfloat16)).float().square().sum().backward()
    assert layer.weight.grad is None
    assert adapter.lora_A.grad is not None
    assert adapter.lora_A.grad.dtype == torch.float32
    assert adapter.lora_A.grad.abs().sum() > 0
    assert adapter.lora_B.grad is not None
    assert adapter.lora_B.grad.abs().sum() > 0


def test_dropout_of_the_adapter_follows_train_and_eval() -> None:
    layer = nn.Linear(32, 8)
    adapter = adapter_of(layer, LoRAConfig(rank=4, dropout=0.5))
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(4, 32)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_weight_update_gives_the_adapted_output() -> None:
    layer = nn.Linear(8, 6, dtype=torch.float64)
    adapter = adapter_of(layer, LoRAConfig(rank=2, alpha=3))
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight + adapter.weight_update(layer.weight), layer.bias)
    )


def test_printing_an_adapter_shows_its_settings() -> None:
    adapter = adapter_of(nn.Linear(8, 6), LoRAConfig(rank=2, alpha=3, dropout=0.1))
    assert "rank=2, alpha=3, scaling=1.5, dropout=0.1" in repr(adapter)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1)])
def test_layers_of_one_feature_can_be_adapted(shape: tuple[int, int]) -> None:
    layer = nn.Linear(*shape)
    x = torch.randn(3, shape[0])
    before = layer(x)
    adapter_of(layer, LoRAConfig(rank=4))
    assert torch.equal(layer(x), before)
