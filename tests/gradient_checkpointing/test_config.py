"""The config of gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.gradient_checkpointing import GradientCheckpointingConfig, as_gradient_checkpointing_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("every_n", 0),
        ("every_n", True),
        ("every_n", 1.5),
        ("offload", "yes"),
        ("blocks", ()),
        ("blocks", ""),
        ("blocks", 3),
        ("blocks", ("auto", "layers")),
    ],
)
def test_a_value_without_a_meaning_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        GradientCheckpointingConfig(**{field: value})


def test_one_pattern_and_a_list_of_them_mean_the_same() -> None:
    assert GradientCheckpointingConfig(blocks="layers").blocks == ("layers",)
    assert GradientCheckpointingConfig(blocks=["layers"]) == GradientCheckpointingConfig(blocks="layers")  # type: ignore[arg-type]
    assert GradientCheckpointingConfig(blocks=("auto",)) == GradientCheckpointingConfig()


@pytest.mark.parametrize(
    ("value", "config"),
    [
        (None, None),
        (False, None),
        (True, GradientCheckpointingConfig()),
        ({"every_n": 2, "_target_": "x"}, GradientCheckpointingConfig(every_n=2)),
        (GradientCheckpointingConfig(offload=True), GradientCheckpointingConfig(offload=True)),
    ],
)
def test_what_users_and_hydra_write_becomes_a_config(value: Any, config: GradientCheckpointingConfig | None) -> None:
    assert as_gradient_checkpointing_config(value) == config


def test_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing must be"):
        as_gradient_checkpointing_config("auto")


@pytest.mark.parametrize("blocks", ["auto", ("layers.*", "head")])
def test_a_config_survives_its_plain_form(blocks: Any) -> None:
    config = GradientCheckpointingConfig(every_n=3, blocks=blocks, offload=True)
    assert as_gradient_checkpointing_config(config.to_dict()) == config
