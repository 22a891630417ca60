"""Hazard: what transformers models are made of: Conv1D, tied heads, packed experts, eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetNotFoundError, inject_adapters, merge_adapters, remove_adapters

transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=31,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config).eval()


def test_conv1d_layers_are_adapted_in_their_own_orientation_and_merge() -> None:
    net, tokens = gpt2(), torch.arange(6)[None]
    start = net(tokens).logits.detach()
    report = inject_adapters(net, LoRAConfig(rank=2))
    names = {row.name.rpartition("h.")[2].partition(".")[2] for row in report.layers}
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert {row.shape for row in report.layers if row.name.endswith("c_attn")} == {(48, 16)}
    assert torch.equal(net(tokens).logits, start)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith("lora_B"):
                value.normal_()
    adapted = net(tokens).logits.detach()
    assert not torch.allclose(adapted, start)
    merge_adapters(net)
    torch.testing.assert_close(net(tokens).logits, adapted, rtol=1e-4, atol=1e-4)


def test_a_tied_head_of_transformers_is_skipped_by_presets_and_refused_by_name() -> None:
    assert "lm_head" in inject_adapters(gpt2(), LoRAConfig(rank=2)).skipped
    with pytest.raises(TargetNotFoundError, match=r"tied to 'transformer\.wte'"):
        inject_adapters(gpt2(), LoRAConfig(target_modules=["lm_head"]))


def test_packed_experts_are_reported_as_not_adapted() -> None:
    net = mixtral()
    packed = [name for name, p in net.named_parameters() if p.ndim == 3]
    if not packed:
        pytest.skip("this release of transformers keeps experts in linear layers of their own")
    report = inject_adapters(net, LoRAConfig(rank=2))
    assert "stacked in one parameter" in report.skipped[packed[0].rpartition(".")[0]]
    assert report.layers


def test_removal_gives_transformers_its_classes_back() -> None:
    net, other = gpt2(), gpt2()
    inject_adapters(net, LoRAConfig(rank=2))
    remove_adapters(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in other.modules()]
    assert net.lm_head.weight is net.transformer.wte.weight
    assert isinstance(net.lm_head, nn.Linear)
