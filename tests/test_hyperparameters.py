"""Hyper-parameters in a checkpoint are plain, and what can't be is named."""

from __future__ import annotations

import dataclasses
import io
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_lora.hyperparameters import make_hyperparameters_plain


@dataclasses.dataclass
class Settings:
    width: int = 3


def make_plain(values: Any, entry: str = "hyper_parameters") -> tuple[dict[str, Any], dict[str, list[str]]]:
    checkpoint: dict[str, Any] = {entry: values}
    changes = make_hyperparameters_plain(checkpoint)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)[entry], changes


PLAIN = {
    "number": 1,
    "float": 0.5,
    "text": "x",
    "nothing": None,
    "flag": True,
    "list": [1, [2, "x"]],
    "pair": (1, 2),
    "nested": {"a": {"b": [1]}},
    "tensor": torch.ones(2),
    "dtype": torch.float16,
    "ordered": OrderedDict(a=1),
}


@pytest.mark.parametrize("entry", ["hyper_parameters", "datamodule_hyper_parameters"])
def test_plain_values_stay_as_they_are(entry: str) -> None:
    values, changes = make_plain(dict(PLAIN), entry)
    assert changes == {"left_out": [], "omegaconf": []}
    assert list(values) == list(PLAIN)
    assert all(values[key] == PLAIN[key] for key in PLAIN if key != "tensor")
    assert torch.equal(values["tensor"], torch.ones(2))
    assert isinstance(values["pair"], tuple)


@pytest.mark.parametrize("path", [Path("a/b"), PurePosixPath("a/b")])
def test_paths_become_strings_however_deep(path: Any) -> None:
    values, changes = make_plain({"path": path, "deep": {"list": [path, (path,)]}})
    assert values == {"path": "a/b", "deep": {"list": ["a/b", ("a/b",)]}}
    assert changes["left_out"] == []


def test_omegaconf_nodes_become_plain_and_are_named() -> None:
    values, changes = make_plain(
        {
            "node": OmegaConf.create({"a": [1, {"b": 2}], "c": "${.a.0}"}),
            "list": OmegaConf.create([1, 2]),
            "inside": {"node": OmegaConf.create({"x": 1})},
            "plain": 3,
        }
    )
    assert values == {
        "node": {"a": [1, {"b": 2}], "c": 1},
        "list": [1, 2],
        "inside": {"node": {"x": 1}},
        "plain": 3,
    }
    assert type(values["node"]["a"]) is list
    assert changes == {"left_out": [], "omegaconf": ["node", "list", "inside"]}


def test_hyperparameters_that_are_one_omegaconf_node_become_a_dict() -> None:
    values, changes = make_plain(OmegaConf.create({"a": 1, "b": {"c": 2}}))
    assert values == {"a": 1, "b": {"c": 2}}
    assert "*" in changes["omegaconf"]


@pytest.mark.parametrize(
    "value",
    [
        nn.Linear(2, 2),
        [nn.Linear(2, 2)],
        {"net": {"inner": nn.ReLU()}},
        Settings(),
        lambda x: x,
        object(),
        torch.optim.SGD,
        torch.nn.Linear,
        {1, 2}.__iter__,
        (line for line in ()),
    ],
    ids=["module", "list of modules", "nested module", "dataclass", "lambda", "object", "class", "layer", "m", "gen"],
)
def test_what_cannot_be_opened_safely_is_left_out_and_named(value: Any) -> None:
    values, changes = make_plain({"keep": 1, "drop": value})
    assert values == {"keep": 1}
    assert changes["left_out"] == ["drop"]


def test_a_name_that_is_no_string_is_named_as_one() -> None:
    values, changes = make_plain({1: 2, 3: object()})
    assert values == {1: 2}
    assert changes["left_out"] == ["3"]


def test_the_module_s_own_values_are_not_changed() -> None:
    own = {"path": Path("a"), "module": nn.ReLU(), "nested": {"path": Path("b")}}
    make_plain(own)
    assert own["path"] == Path("a")
    assert isinstance(own["module"], nn.ReLU)
    assert own["nested"] == {"path": Path("b")}


def test_types_of_containers_that_lightning_notes_are_dropped() -> None:
    checkpoint: dict[str, Any] = {"hyper_parameters": {}, "hparams_type": dict, "datamodule_hparams_type": dict}
    make_hyperparameters_plain(checkpoint)
    assert set(checkpoint) == {"hyper_parameters"}


def test_a_checkpoint_without_hyperparameters_stays_without() -> None:
    checkpoint: dict[str, Any] = {"state_dict": {}}
    assert make_hyperparameters_plain(checkpoint) == {"left_out": [], "omegaconf": []}
    assert checkpoint == {"state_dict": {}}


def test_an_interpolation_that_means_nothing_here_is_kept_as_written_and_others_are_resolved() -> None:
    node = OmegaConf.create({"a": 1, "b": "${.a}", "cwd": "${hydra:runtime.cwd}", "needed": "???", "c": ["${cwd}", 2]})
    expected = {"a": 1, "b": 1, "cwd": "${hydra:runtime.cwd}", "needed": "???", "c": ["${cwd}", 2]}
    for given in (node, {"node": node}):
        values, changes = make_plain(given)
        assert (values if given is node else values["node"]) == expected
        assert changes["left_out"] == []


@pytest.mark.parametrize("name", ["cfg", "kwargs", None])
def test_one_argument_that_holds_all_values_is_noted_as_readable_by_attribute(name: str | None) -> None:
    checkpoint: dict[str, Any] = {"hyper_parameters": OmegaConf.create({"a": 1}), "hparams_name": name}
    checkpoint["hparams_type"] = type(checkpoint["hyper_parameters"])
    make_hyperparameters_plain(checkpoint)
    assert checkpoint.get("hparams_type") == ("AttributeDict" if name == "cfg" else None)


def test_for_the_original_class_nested_omegaconf_is_read_by_attribute_and_opens_safely() -> None:
    checkpoint: dict[str, Any] = {
        "hyper_parameters": {"cfg": OmegaConf.create({"net": {"width": 3, "items": [{"a": 1}]}})}
    }
    make_hyperparameters_plain(checkpoint, keep_objects=True)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    cfg = torch.load(file, weights_only=True)["hyper_parameters"]["cfg"]
    assert cfg.net.width == cfg["net"]["width"] == 3
    assert cfg["net"]["items"][0].a == 1
    assert list(cfg.net.items()) == [("width", 3), ("items", [{"a": 1}])]
