"""One rule for names: a pattern matches a dotted name or any ending of it that starts after a dot."""

from __future__ import annotations

import pytest

from lightning_lora.targets import Pattern, matches_any
from lightning_lora.targets.patterns import canonical

NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        "self_attn.q_proj",
        "11.self_attn.q_proj",
        NAME,
        "*_proj",
        "q_*",
        "*",
        "layers.*.q_proj",
        "model.*",
        "layers.11.*",
        "self_attn.*",
        r"layers\.\d+\.self_attn\.(q|k)_proj",
        r"(q|v)_proj",
        r"^model\..*proj$",
        r"q_proj$",
        r".*q_proj",
        r".*\.q_proj",
        r"[qv]_proj",
        r"q_pro+j",
    ],
)
def test_matches(text: str) -> None:
    assert Pattern(text).matches(NAME)


@pytest.mark.parametrize(
    "text",
    [
        "proj",
        "_proj",
        "attn.q_proj",
        "layers.1.*",
        "layers.1.*.q_proj",
        "layers.*.proj",
        "layers.*.k_proj",
        "self_attn",
        "model",
        "model.layers",
        r"^q_proj",
        r"^layers\..*",
        r"(k|v)_proj",
        r"layers\.1\..*",
        r"q_pro",
        r"[kv]_proj",
        "Q_PROJ",
        "q.proj",
    ],
)
def test_does_not_match(text: str) -> None:
    assert not Pattern(text).matches(NAME)


def test_a_dot_of_a_plain_name_or_wildcard_is_a_dot() -> None:
    assert not Pattern("attn.proj").matches("attn_proj")
    assert not Pattern("attn.*").matches("attn_out")
    assert Pattern(r"attn.proj|x").matches("attn_proj")  # in a regular expression it is any character


@pytest.mark.parametrize("text", ["q_(proj", "[qv", "q_proj)", "*q+", "a{2,1}", "(?P<a"])
def test_a_broken_regular_expression_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid regular expression") as error:
        Pattern(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.0", "model.layers.0"),
        ("_orig_mod.model.layers.0", "model.layers.0"),
        ("model._orig_mod.layers.0._checkpoint_wrapped_module.q", "model.layers.0.q"),
        ("model._fsdp_wrapped_module.q", "model.q"),
        ("model.fc._orig_mod", "model.fc"),
        ("my_orig_mod.fc", "my_orig_mod.fc"),
        ("model._orig_mod_b.fc", "model._orig_mod_b.fc"),
        ("", ""),
    ],
)
def test_canonical_takes_out_what_wrappers_insert_and_nothing_else(name: str, wanted: str) -> None:
    assert canonical(name) == wanted


def test_a_wrapped_name_matches_as_the_plain_one() -> None:
    assert Pattern("model.layers.0.q_proj").matches("_orig_mod.model.layers._orig_mod.0.q_proj")


@pytest.mark.parametrize(
    ("text", "names", "wanted"),
    [
        ("q_prj", [NAME, "model.layers.11.mlp.up_proj"], "q_proj"),
        ("atn.q_proj", ["h.0.attn.q_proj", "h.0.mlp.up"], "attn.q_proj"),
        ("query", ["encoder.key", "encoder.query_"], "query_"),
    ],
)
def test_the_nearest_names_come_first(text: str, names: list[str], wanted: str) -> None:
    assert Pattern(text).nearest(names)[0] == wanted


def test_nothing_is_near_to_nonsense() -> None:
    assert Pattern("0123456789").nearest([NAME]) == []


def test_matches_any() -> None:
    assert matches_any(["k_proj", "q_proj"], NAME)
    assert not matches_any(["k_proj"], NAME)
    assert not matches_any([], NAME)
