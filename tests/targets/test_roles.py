"""Presets on real architectures: each selects exactly the layers that its name says."""

from __future__ import annotations

import re

import pytest
from torch import nn

from lightning_lora import LoRAConfig, TargetNotFoundError, inject_adapters
from lightning_lora.targets import select_targets
from tests.targets.architectures import build

HEAD = "output head"
TIED = "its weight is tied to"
ATTENTION_IN_TORCH = "nn.MultiheadAttention uses this weight without calling the layer"

# Architecture -> preset -> layers, with * for a block's index and {a,b} for alternatives.
EXPECTED: dict[str, dict[str, list[str]]] = {
    "llama": {
        "attention": ["model.layers.*.self_attn.{q,k,v,o}_proj"],
        "attention-qv": ["model.layers.*.self_attn.{q,v}_proj"],
        "mlp": ["model.layers.*.mlp.{gate,up,down}_proj"],
    },
    "phi3": {
        "attention": ["model.layers.*.self_attn.{qkv,o}_proj"],
        "attention-qv": ["model.layers.*.self_attn.qkv_proj"],
        "mlp": ["model.layers.*.mlp.{gate_up,down}_proj"],
    },
    "gpt2": {
        "attention": ["transformer.h.*.attn.{c_attn,c_proj}"],
        "attention-qv": ["transformer.h.*.attn.c_attn"],
        "mlp": ["transformer.h.*.mlp.{c_fc,c_proj}"],
    },
    "bert": {
        "attention": [
            "bert.encoder.layer.*.attention.self.{query,key,value}",
            "bert.encoder.layer.*.attention.output.dense",
        ],
        "attention-qv": ["bert.encoder.layer.*.attention.self.{query,value}"],
        "mlp": ["bert.encoder.layer.*.{intermediate,output}.dense"],
        "beside": ["bert.pooler.dense"],
    },
    "distilbert": {
        "attention": ["distilbert.transformer.layer.*.attention.{q,k,v,out}_lin"],
        "attention-qv": ["distilbert.transformer.layer.*.attention.{q,v}_lin"],
        "mlp": ["distilbert.transformer.layer.*.ffn.{lin1,lin2}"],
        "beside": ["pre_classifier"],
    },
    "t5": {
        "attention": [
            "encoder.block.*.layer.0.SelfAttention.{q,k,v,o}",
            "decoder.block.*.layer.0.SelfAttention.{q,k,v,o}",
            "decoder.block.*.layer.1.EncDecAttention.{q,k,v,o}",
        ],
        "attention-qv": [
            "encoder.block.*.layer.0.SelfAttention.{q,v}",
            "decoder.block.*.layer.0.SelfAttention.{q,v}",
            "decoder.block.*.layer.1.EncDecAttention.{q,v}",
        ],
        "mlp": ["encoder.block.*.layer.1.DenseReluDense.{wi,wo}", "decoder.block.*.layer.2.DenseReluDense.{wi,wo}"],
    },
    "vit": {
        "attention": ["vit.layers.*.attention.{q,k,v,o}_proj"],
        "attention-qv": ["vit.layers.*.attention.{q,v}_proj"],
        "mlp": ["vit.layers.*.mlp.{fc1,fc2}"],
    },
    "clip": {
        "attention": ["{text,vision}_model.encoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}"],
        "attention-qv": ["{text,vision}_model.encoder.layers.*.self_attn.{q,v}_proj"],
        "mlp": ["{text,vision}_model.encoder.layers.*.mlp.{fc1,fc2}"],
        "beside": ["{text,visual}_projection"],
    },
    "timm naming": {
        "attention": ["blocks.*.attn.{qkv,proj}"],
        "attention-qv": ["blocks.*.attn.qkv"],
        "mlp": ["blocks.*.mlp.{fc1,fc2}"],
    },
    "mixtral": {
        "attention": ["model.layers.*.self_attn.{q,k,v,o}_proj"],
        "attention-qv": ["model.layers.*.self_attn.{q,v}_proj"],
    },
    "torch encoder": {"mlp": ["layers.*.{linear1,linear2}"]},
    "lightning demo": {"mlp": ["transformer.{encoder,decoder}.layers.*.{linear1,linear2}"]},
}
DEPTH = {"llama": 4}
SKIPPED: dict[str, dict[str, str]] = {
    "llama": {"lm_head": HEAD},
    "phi3": {"lm_head": HEAD},
    "gpt2": {"lm_head": TIED},
    "bert": {"classifier": HEAD},
    "distilbert": {"classifier": HEAD},
    "t5": {"lm_head": TIED},
    "vit": {"classifier": HEAD},
    "timm naming": {"head": HEAD},
    "mixtral": {
        "lm_head": HEAD,
        **{f"model.layers.{i}.mlp.experts": r"matrices stacked in one parameter \(gate_up_proj" for i in range(2)},
    },
    "torch encoder": {f"layers.{i}.self_attn.out_proj": ATTENTION_IN_TORCH for i in range(2)},
    "lightning demo": {
        "decoder": HEAD,
        **{f"transformer.encoder.layers.{i}.self_attn.out_proj": ATTENTION_IN_TORCH for i in range(2)},
        **{f"transformer.decoder.layers.{i}.self_attn.out_proj": ATTENTION_IN_TORCH for i in range(2)},
        **{f"transformer.decoder.layers.{i}.multihead_attn.out_proj": ATTENTION_IN_TORCH for i in range(2)},
    },
}


def expand(text: str, depth: int) -> set[str]:
    """All names that a shorthand stands for."""
    alternatives = re.search(r"\{([^}]*)\}", text)
    if alternatives:
        return {
            name
            for choice in alternatives[1].split(",")
            for name in expand(text.replace(alternatives[0], choice, 1), depth)
        }
    return {text.replace("*", str(index)) for index in range(depth)} if "*" in text else {text}


def expected(name: str, *presets: str) -> set[str]:
    return {
        layer
        for preset in presets
        for text in EXPECTED[name].get(preset, [])
        for layer in expand(text, DEPTH.get(name, 2))
    }


def selected(model: nn.Module, preset: str) -> set[str]:
    return {target.name for target in select_targets(model, LoRAConfig(target_modules=preset)).targets}


@pytest.mark.parametrize("name", EXPECTED)
def test_all_linear_is_attention_and_mlp_and_what_lies_beside_but_no_head(name: str) -> None:
    selection = select_targets(build(name), LoRAConfig(target_modules="all-linear"))
    assert {target.name for target in selection.targets} == expected(name, "attention", "mlp", "beside")
    assert set(selection.skipped) == set(SKIPPED.get(name, {}))
    for layer, reason in SKIPPED.get(name, {}).items():
        assert re.match(reason, selection.skipped[layer])


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name, presets in EXPECTED.items() for preset in presets if preset != "beside"],
)
def test_a_preset_selects_exactly_its_layers(name: str, preset: str) -> None:
    assert selected(build(name), preset) == expected(name, preset)


@pytest.mark.parametrize("preset", ["attention", "attention-qv"])
@pytest.mark.parametrize("name", ["torch encoder", "lightning demo"])
def test_attention_without_linear_layers_is_refused(name: str, preset: str) -> None:
    with pytest.raises(TargetNotFoundError, match=f"target_modules='{preset}' selects no layer of Transformer"):
        selected(build(name), preset)


def test_packed_experts_alone_are_refused_with_the_reason() -> None:
    with pytest.raises(TargetNotFoundError, match=r"selects no layer of Mixtral.*experts'.*stacked in one parameter"):
        selected(build("mixtral"), "mlp")


def test_the_report_of_a_mixture_lists_the_experts_as_not_adapted() -> None:
    report = inject_adapters(build("mixtral"), LoRAConfig(rank=2))
    assert "gate_up_proj, down_proj" in report.skipped["model.layers.0.mlp.experts"]


def test_presets_do_not_depend_on_where_the_model_hangs() -> None:
    root = nn.ModuleDict({"net": nn.ModuleDict({"inner": build("bert")})})
    assert selected(root, "attention-qv") == {f"net.inner.{name}" for name in expected("bert", "attention-qv")}


def test_presets_see_through_adapters_that_are_there_already() -> None:
    model = build("gpt2")
    inject_adapters(model, LoRAConfig(rank=2))
    for preset in ("attention", "attention-qv", "mlp"):
        assert selected(model, preset) == expected("gpt2", preset)


def test_an_untied_head_is_a_head() -> None:
    model = build("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    selection = select_targets(model, LoRAConfig())
    assert selection.skipped == {"lm_head": "output head (name it in target_modules or modules_to_save to train it)"}


@pytest.mark.parametrize("name", ["head", "classifier", "fc", "lm_head", "score", "output_layer", "decoder"])
def test_a_linear_layer_with_a_head_s_name_is_no_target_of_all_linear(name: str) -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.Linear(4, 2)})
    selection = select_targets(net, LoRAConfig())
    assert [target.name for target in selection.targets] == ["body"]
    assert HEAD in selection.skipped[name]


def test_a_head_by_name_can_be_asked_for() -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    assert [t.name for t in select_targets(net, LoRAConfig(target_modules="head")).targets] == ["head"]


def test_a_layer_onto_the_vocabulary_is_a_head_whatever_its_name() -> None:
    net = nn.ModuleDict({"emb": nn.Embedding(30, 4), "mid": nn.Linear(4, 4), "to_words": nn.Linear(4, 30)})
    assert [t.name for t in select_targets(net, LoRAConfig()).targets] == ["mid"]


def test_a_chain_of_layers_may_end_in_a_head() -> None:
    net = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 30))
    selection = select_targets(net, LoRAConfig())
    assert [t.name for t in selection.targets] == ["1"]
    assert HEAD in selection.skipped["3"]


def test_layers_inside_blocks_are_no_heads_whatever_their_name() -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)}) for _ in range(2))
    net = nn.ModuleDict({"blocks": blocks})
    assert len(select_targets(net, LoRAConfig()).targets) == 4
