"""From a config to layers with their ranks: patterns, exclusions, and reasons for what stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetNotFoundError, UnsupportedSetupError
from lightning_lora.targets import select_targets


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(4, 10)


@pytest.fixture
def model() -> Model:
    return Model()


def names(module: nn.Module, **options: Any) -> list[str]:
    return [target.name for target in select_targets(module, LoRAConfig(**options)).targets]


def test_targets_come_in_module_order_whatever_the_order_of_the_patterns(model: Model) -> None:
    wanted = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]
    wanted += ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert names(model, target_modules=["q_proj", "v_proj"]) == wanted
    assert names(model, target_modules=["v_proj", "q_proj", "v_proj"]) == wanted
    assert names(model, target_modules="(q|v)_proj") == wanted
    assert names(model, target_modules="attention-qv") == wanted


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("layers.0.self_attn.q_proj", ["layers.0.self_attn.q_proj"]),
        ("1.self_attn.q_proj", ["layers.1.self_attn.q_proj"]),
        ("mlp.0", ["layers.0.mlp.0", "layers.1.mlp.0"]),
        ("layers.1.mlp.*", ["layers.1.mlp.0", "layers.1.mlp.2"]),
        (r"layers\.1\.mlp\.[02]", ["layers.1.mlp.0", "layers.1.mlp.2"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_patterns(model: Model, pattern: str, wanted: list[str]) -> None:
    assert names(model, target_modules=pattern) == wanted


def test_presets_and_patterns_add_up(model: Model) -> None:
    both = names(model, target_modules=["attention-qv", "lm_head"])
    assert both == [*names(model, target_modules="attention-qv"), "lm_head"]


def test_selecting_changes_nothing(model: Model) -> None:
    before = copy.deepcopy(model)
    select_targets(model, LoRAConfig())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "q_porj"}, r"target_modules: 'q_porj' matches no module of Model\. Closest: 'q_proj'"),
        ({"target_modules": ["q_proj", "qkv"]}, r"target_modules: 'qkv' matches no module of Model"),
        ({"target_modules": "attn.q_proj"}, r"'attn\.q_proj' matches no module .*Closest: 'self_attn\.q_proj'"),
        ({"target_modules": "all_linear"}, r"'all_linear' matches no module of Model\. Closest: 'all-linear'"),
        ({"target_modules": "zzzzz"}, r"Its layers that can be adapted end in: .*k_proj, lm_head, q_proj, v_proj"),
        ({"target_modules": "embed"}, r"'embed' matches 'embed' of type Embedding, which cannot carry an adapter"),
        ({"target_modules": "self_attn"}, r"of type Attention, .*Name the layers inside it, such as .*q_proj"),
        ({"target_modules": "norm"}, r"of type LayerNorm, which cannot carry an adapter; nn.Linear and transformers'"),
        ({"exclude_modules": "q_prj"}, r"exclude_modules: 'q_prj' matches no module\. Closest: 'q_proj'"),
        ({"target_modules": "q_proj", "exclude_modules": "layers"}, r"Not adapted: .*excluded by 'layers'"),
        ({"rank_pattern": {"kproj": 4}}, r"rank_pattern: 'kproj' matches no adapted layer\. Closest: 'k_proj'"),
        (
            {"target_modules": "q_proj", "alpha_pattern": {"k_proj": 4}},
            r"alpha_pattern: 'k_proj' matches no adapted layer\. Closest: 'q_proj'",
        ),
        ({"layers": 2}, r"layers entry 2 selects no target layer; there is layers with 2 blocks"),
        ({"target_modules": "q_(proj"}, r"'q_\(proj' is not a valid regular expression"),
        ({"exclude_modules": "lm_head["}, r"'lm_head\[' is not a valid regular expression"),
        ({"rank_pattern": {"q[": 4}}, r"'q\[' is not a valid regular expression"),
    ],
    ids=str,
)
def test_what_fits_nothing_is_refused_with_a_hint(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(model, **options)


def test_a_module_that_is_not_complete_yet_is_given_time(model: Model) -> None:
    config = LoRAConfig(target_modules=["q_proj", "later"], exclude_modules=["later"], rank_pattern={"later": 2})
    selection = select_targets(model, config, strict=False)
    assert len(selection.targets) == 2
    assert select_targets(nn.Module(), config, strict=False).targets == []


def test_excluding_a_module_excludes_what_is_inside_it(model: Model) -> None:
    selection = select_targets(model, LoRAConfig(exclude_modules=["layers.0", "mlp.2"]))
    assert [t.name for t in selection.targets] == [
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.k_proj",
        "layers.1.self_attn.v_proj",
        "layers.1.mlp.0",
    ]
    assert selection.skipped["layers.0.mlp.0"] == "excluded by 'layers.0'"
    assert selection.skipped["layers.1.mlp.2"] == "excluded by 'mlp.2'"


def test_the_first_pattern_that_matches_sets_rank_and_alpha(model: Model) -> None:
    config = LoRAConfig(
        rank=8,
        alpha=16,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 4},
        alpha_pattern={"v_proj": 1.0},
    )
    found = {t.name: (t.rank, t.alpha) for t in select_targets(model, config).targets}
    assert found == {
        "layers.0.self_attn.q_proj": (2, 16.0),
        "layers.0.self_attn.v_proj": (8, 1.0),
        "layers.1.self_attn.q_proj": (4, 16.0),
        "layers.1.self_attn.v_proj": (8, 1.0),
    }


def test_saved_modules_get_no_adapter(model: Model) -> None:
    selection = select_targets(model, LoRAConfig(), saved=frozenset({"layers.0"}))
    assert not any(t.name.startswith("layers.0") for t in selection.targets)
    assert selection.skipped["layers.0.mlp.0"] == "trained in full (modules_to_save)"


def test_a_shared_layer_is_one_target_that_any_of_its_names_selects() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(4, 4)})
    assert names(net) == ["first", "other"]
    assert names(net, target_modules="second") == ["first"]
    assert names(net, exclude_modules="second") == ["other"]


@pytest.mark.parametrize("ask", ["all-linear", "out"])
def test_a_tied_layer_is_skipped_by_a_preset_and_refused_by_name(ask: str) -> None:
    net = nn.ModuleDict({"emb": nn.Embedding(6, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 6)})
    net["out"].weight = net["emb"].weight
    if ask == "all-linear":
        selection = select_targets(net, LoRAConfig())
        assert [t.name for t in selection.targets] == ["mid"]
        assert "tied to 'emb'" in selection.skipped["out"]
    else:
        with pytest.raises(TargetNotFoundError, match=r"'out', which cannot be adapted: its weight is tied to 'emb'"):
            names(net, target_modules=ask)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_parametrized_layer_is_skipped_by_a_preset_and_refused_by_name(norm: Any) -> None:
    net = nn.ModuleDict({"a": norm(nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    selection = select_targets(net, LoRAConfig())
    assert [t.name for t in selection.targets] == ["b"]
    assert "its weight is computed from others (weight_norm" in selection.skipped["a"]
    with pytest.raises(TargetNotFoundError, match=r"'a', which cannot be adapted: its weight is computed"):
        names(net, target_modules="a")


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LazyLinear(2)})
    with pytest.raises(UnsupportedSetupError, match=r"'b' is a lazy layer whose shape is not known yet"):
        names(net)
    net["b"](torch.randn(1, 4))
    assert names(net) == ["a", "b"]


def test_a_script_module_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TargetNotFoundError, match=r"'net' is a ScriptModule, .*pass the eager module"):
        names(nn.ModuleDict({"net": scripted}))


def test_a_module_without_linear_layers_says_what_to_do() -> None:
    with pytest.raises(TargetNotFoundError, match=r"no nn\.Linear and no transformers Conv1D.*configure_model\(\)"):
        names(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_a_layer_whose_weight_is_no_float_is_skipped() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["a"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    selection = select_targets(net, LoRAConfig())
    assert [t.name for t in selection.targets] == ["b"]
    assert "not a dense floating-point tensor (Linear)" in selection.skipped["a"]


def test_a_layer_with_attributes_of_our_names_is_left_alone() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["a"].active = True
    selection = select_targets(net, LoRAConfig())
    assert [t.name for t in selection.targets] == ["b"]
    assert "an attribute 'adapters' or 'active' of its own" in selection.skipped["a"]


def test_positional_parameters_of_three_dimensions_are_no_experts() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3)})
    net.register_parameter("positions", nn.Parameter(torch.zeros(1, 9, 4)))
    assert select_targets(net, LoRAConfig()).skipped == {}


def test_names_are_seen_through_torch_compile() -> None:
    net = nn.ModuleDict({"part": torch.compile(Block(), backend="eager")})
    assert names(net, target_modules="part.self_attn.q_proj") == ["part._orig_mod.self_attn.q_proj"]
    assert len(names(net)) == 5


def test_a_compiled_linear_layer_is_found_under_its_own_name() -> None:
    net = nn.ModuleDict({"fc1": torch.compile(nn.Linear(2, 2), backend="eager")})
    assert names(net, target_modules="fc1") == ["fc1._orig_mod"]
