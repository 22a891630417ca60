"""Which AdamW: named, checked, plain."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_lora.optimizer_swap import OptimizerConfig, as_optimizer_config


def test_the_default_is_8_bit() -> None:
    assert OptimizerConfig() == OptimizerConfig(kind="adamw8bit")


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit", "paged_adamw", "adamw"])
def test_a_name_a_mapping_and_a_config_mean_the_same(kind: str) -> None:
    config = OptimizerConfig(kind=kind)
    forms: list[Any] = [kind, {"kind": kind}, {"_target_": "lightning_lora.OptimizerConfig", "kind": kind}, config]
    assert [as_optimizer_config(form) for form in forms] == [config] * 4
    assert OptimizerConfig(**config.to_dict()) == config


def test_none_stays_none() -> None:
    assert as_optimizer_config(None) is None


@pytest.mark.parametrize("kind", ["lion8bit", "AdamW8bit", "", None, 8])
def test_another_kind_is_refused_with_those_there_are(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of adamw8bit, paged_adamw8bit, paged_adamw, adamw; got"):
        OptimizerConfig(kind=kind)


@pytest.mark.parametrize("value", [True, 8, ["adamw8bit"]])
def test_another_type_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"optimizer must be None, one of adamw8bit, .*, or an OptimizerConfig; got"):
        as_optimizer_config(value)


def test_a_config_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizerConfig().kind = "adamw"  # type: ignore[misc]
