"""Configs: what is accepted, what it is normalised to, and what is refused with a message that helps."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_lora import LoRACallback, LoRAConfig, MergeConfig

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, r"rank must be an integer of at least 1, got 0"),
    ({"rank": -4}, r"rank must be an integer of at least 1, got -4"),
    ({"rank": 4.0}, r"rank must be an integer of at least 1, got 4\.0"),
    ({"rank": "8"}, r"rank must be an integer of at least 1, got '8'"),
    ({"rank": True}, r"rank must be an integer of at least 1, got True"),
    ({"rank": None}, r"rank must be an integer of at least 1, got None"),
    ({"alpha": 0}, r"alpha must be a positive number, got 0"),
    ({"alpha": -1.0}, r"alpha must be a positive number, got -1\.0"),
    ({"alpha": float("nan")}, r"alpha must be a positive number, got nan"),
    ({"alpha": float("inf")}, r"alpha must be a positive number, got inf"),
    ({"alpha": "16"}, r"alpha must be a positive number, got '16'"),
    ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1\.0"),
    ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0\.1"),
    ({"dropout": float("nan")}, r"dropout must be a number in \[0, 1\), got nan"),
    ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), got '0\.1'"),
    ({"dropout": False}, r"dropout must be a number in \[0, 1\), got False"),
    ({"init": "xavier"}, r"init must be one of kaiming, gaussian; got 'xavier'"),
    ({"init": ["kaiming"]}, r"init must be one of kaiming, gaussian; got \['kaiming'\]"),
    ({"rank_stabilized": "yes"}, r"rank_stabilized must be True or False, got 'yes'"),
    ({"seed": 1.5}, r"seed must be an integer, got 1\.5"),
    ({"seed": None}, r"seed must be an integer, got None"),
    ({"target_modules": ()}, r"target_modules is empty: name at least one layer"),
    ({"target_modules": ""}, r"target_modules must hold non-empty strings, got ''"),
    ({"target_modules": ["q", " "]}, r"target_modules must hold non-empty strings, got ' '"),
    ({"target_modules": None}, r"target_modules must be a string or a list of strings, got None"),
    ({"target_modules": 3}, r"target_modules must be a string or a list of strings, got 3"),
    ({"target_modules": ["q", 3]}, r"target_modules must hold non-empty strings, got 3"),
    ({"target_modules": {"q": 1}}, r"target_modules must be a string or a list of strings, got \{"),
    ({"target_modules": b"q"}, r"target_modules must be a string or a list of strings, got b'q'"),
    ({"exclude_modules": 1}, r"exclude_modules must be a string or a list of strings, got 1"),
    ({"modules_to_save": [None]}, r"modules_to_save must hold non-empty strings, got None"),
    ({"layers": []}, r"layers must be None, an index, a range"),
    ({"layers": 1.5}, r"layers must be None, an index, a range .* got 1\.5"),
    ({"layers": [True]}, r"layers must be None, an index, a range .* got \[True\]"),
    ({"layers": [[1]]}, r"layers must be None, an index, a range .* got \[\[1\]\]"),
    ({"rank_pattern": ["q"]}, r"rank_pattern must map patterns to values, got \['q'\]"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be an integer of at least 1, got 0"),
    ({"rank_pattern": {3: 4}}, r"keys of rank_pattern must be a string or a list of strings, got 3"),
    ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\] must be a positive number, got 'x'"),
    ({"alpha_pattern": None}, r"alpha_pattern must map patterns to values, got None"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_a_wrong_value_is_refused_at_construction_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "first"}, r"source must be one of last, best; got 'first'"),
        ({"source": None}, r"source must be one of last, best; got None"),
        ({"dtype": "int8"}, r"dtype must be None or one of float32, bfloat16, float16; got 'int8'"),
        ({"output_dir": " "}, r"output_dir must be None or the path of a folder, got"),
        ({"tolerance": 0}, r"tolerance must be a positive number, got 0"),
        ({"tolerance": float("nan")}, r"tolerance must be a positive number, got nan"),
        ({"tolerance": "0.1"}, r"tolerance must be a positive number, got '0\.1'"),
        ({"in_place": "no"}, r"in_place must be True or False, got 'no'"),
        ({"output_dir": 3}, r"output_dir must be None or the path of a folder, got"),
    ],
    ids=str,
)
def test_a_wrong_merge_setting_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)


@pytest.mark.parametrize("config", ["all-linear", 8, ["q"], LoRAConfig])
def test_the_callback_takes_a_config_and_nothing_else(config: Any) -> None:
    with pytest.raises(ValueError, match="config must be a LoRAConfig, got"):
        LoRACallback(config)


@pytest.mark.parametrize("merge", ["best", 1, ["last"]])
def test_the_callback_takes_a_merge_config_and_nothing_else(merge: Any) -> None:
    with pytest.raises(ValueError, match="merge_on_fit_end must be True, False or a MergeConfig, got"):
        LoRACallback(merge_on_fit_end=merge)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "ranks"])
def test_an_unknown_field_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        LoRAConfig(**{name: 4})
    with pytest.raises((TypeError, ValueError), match=name):
        LoRACallback({name: 4})  # type: ignore[arg-type]


def test_fields_cannot_be_changed_afterwards() -> None:
    config = LoRAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        LoRAConfig(8)  # type: ignore[misc]


def test_a_single_string_is_a_list_of_one() -> None:
    config = LoRAConfig(target_modules="q", exclude_modules="k", modules_to_save="head", layers="0-1")
    assert config.target_modules == ("q",)
    assert config.exclude_modules == ("k",)
    assert config.modules_to_save == ("head",)
    assert config.layers == ("0-1",)
    assert LoRAConfig(layers=-1).layers == (-1,)


def test_integers_become_floats_where_floats_are_meant() -> None:
    config = LoRAConfig(alpha=16, alpha_pattern={"q": 4})
    assert isinstance(config.alpha, float)
    assert isinstance(config.alpha_pattern["q"], float)


def test_omegaconf_containers_become_plain_ones() -> None:
    node = OmegaConf.create(
        {
            "target_modules": ["q", "v"],
            "exclude_modules": ["k"],
            "layers": [0, "last-half"],
            "rank_pattern": {"q": 4},
            "alpha_pattern": {"v": 2.0},
            "modules_to_save": ["head"],
        }
    )
    config = LoRAConfig(**node)
    assert config == LoRAConfig(
        target_modules=["q", "v"],
        exclude_modules=["k"],
        layers=[0, "last-half"],
        rank_pattern={"q": 4},
        alpha_pattern={"v": 2.0},
        modules_to_save=["head"],
    )
    for field in dataclasses.fields(config):
        assert not type(getattr(config, field.name)).__module__.startswith("omegaconf")
    assert type(config.rank_pattern) is dict


def test_a_config_does_not_follow_later_changes_of_what_it_was_made_from() -> None:
    targets, ranks = ["q"], {"q": 4}
    config = LoRAConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("v")
    ranks["q"] = 8
    assert config.target_modules == ("q",)
    assert config.rank_pattern == {"q": 4}


def test_to_dict_is_plain_json_and_rebuilds_the_config() -> None:
    config = LoRAConfig(
        rank=4, layers=[0, "2-3"], rank_pattern={"q": 2}, modules_to_save="head", dropout=0.1, init="gaussian"
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values.pop("kind") == "lora"
    assert LoRAConfig(**values) == config


def test_configs_compare_by_value_and_pickle() -> None:
    config = LoRAConfig(rank=4, rank_pattern={"q": 2})
    assert config == LoRAConfig(rank=4, rank_pattern={"q": 2})
    assert config != LoRAConfig(rank=4)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_mapping_for_the_callback_is_its_config() -> None:
    callback = LoRACallback(OmegaConf.create({"rank": 4, "target_modules": ["q"]}))  # type: ignore[arg-type]
    assert callback.config == LoRAConfig(rank=4, target_modules=["q"])


@pytest.mark.parametrize(
    ("rank", "alpha", "rank_stabilized", "scaling"), [(8, 16.0, False, 2.0), (16, 8.0, False, 0.5), (4, 2.0, True, 1.0)]
)
def test_scaling_of(rank: int, alpha: float, rank_stabilized: bool, scaling: float) -> None:
    assert LoRAConfig(rank_stabilized=rank_stabilized).scaling_of(rank=rank, alpha=alpha) == scaling
