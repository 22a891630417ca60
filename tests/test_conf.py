"""Every YAML file of conf/ composes, names things that exist, and means what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_lora import GradientCheckpointingConfig

CONF = Path(__file__).parents[1] / "conf"
ROOT_GROUPS = ("model", "data", "adapter", "callbacks", "trainer", "logger")
OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_module("lightning_lora.conf", version_base="1.3"):
        config = hydra.compose("train", overrides=list(overrides))
    config.output_dir = "outputs/test"
    return config


def targets(node: Any) -> list[str]:
    """All ``_target_`` values inside a plain container."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_is_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_its_targets_exist(group: str, option: str) -> None:
    # A data or model option may need its partner; experiments choose both, so each is tried on the tiny one.
    experiment = option if group == "experiment" else "tiny"
    overrides = [f"experiment={experiment}"] + ([] if group == "experiment" else [f"{group}={option}"])
    config = compose(*overrides)
    container = OmegaConf.to_container(config, resolve=group not in ("model", "data"))
    for target in targets(container):
        assert callable(get_object(target)), target


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_resolves_and_nothing_is_missing(experiment: str) -> None:
    config = compose(f"experiment={experiment}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert not OmegaConf.missing_keys(config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_shrunk_to_one_batch(experiment: str) -> None:
    config = compose(f"experiment={experiment}", "debug=fast")
    assert config.trainer.fast_dev_run is True
    assert config.logger is None
    assert config.report is None


def test_a_run_without_model_and_data_is_refused_with_the_options_there_are() -> None:
    with pytest.raises(ConfigCompositionException, match=r"(?s)must specify.*tiny"):
        compose()


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="rnak"):
        compose("experiment=tiny", "adapter.rnak=3")


@pytest.mark.parametrize("option", [name for group, name in OPTIONS if group == "quantization"])
def test_the_callback_gets_the_quantization_and_gradient_checkpointing_that_the_command_line_says(option: str) -> None:
    config = compose("experiment=tiny", f"quantization={option}", "gradient_checkpointing=true")
    callback = hydra.utils.instantiate(config.callbacks.lora)
    assert callback.quantization.double_quant is (option == "nf4_double")
    assert callback.quantization.quant_type == option.removesuffix("_double")
    assert callback.gradient_checkpointing == GradientCheckpointingConfig()


def test_gradient_checkpointing_takes_fields_from_the_command_line() -> None:
    callback = hydra.utils.instantiate(compose("experiment=tiny", "gradient_checkpointing={every_n: 2}").callbacks.lora)
    assert callback.gradient_checkpointing == GradientCheckpointingConfig(every_n=2)
    assert callback.quantization is None


def test_the_command_line_wins_over_the_experiment() -> None:
    assert compose("experiment=tiny", "adapter.rank=64").adapter.rank == 64


@pytest.mark.parametrize("rank", [4, 32])
def test_alpha_stays_where_it_is_unless_it_is_tied(rank: int) -> None:
    assert compose("experiment=tiny", f"adapter.rank={rank}").adapter.alpha == 16.0


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("choice", ["adapter=lora_tied", "adapter.alpha=${.rank}", "sweep=rank"])
def test_alpha_follows_rank_by_choice(choice: str, rank: int) -> None:
    assert compose("experiment=tiny", choice, f"adapter.rank={rank}").adapter.alpha == rank


def test_every_experiment_leaves_the_choice_to_tie_alpha() -> None:
    for experiment in EXPERIMENTS:
        config = compose(f"experiment={experiment}", "adapter=lora_tied", "adapter.rank=5")
        assert config.adapter.alpha == 5, f"experiment={experiment} sets alpha over adapter=lora_tied"


def test_a_foreign_config_borrows_adapter_and_callback_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "defaults:\n  - adapter: lora\n  - callbacks: lora\n  - _self_\n"
        "adapter:\n  rank: 3\n"
        "hydra:\n  searchpath: [pkg://lightning_lora.conf]\n"
    )
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = hydra.compose("config")
    assert set(config) == {"adapter", "callbacks"}
    callback = hydra.utils.instantiate(config.callbacks.lora, _convert_="all")
    assert callback.config.rank == 3


def test_a_callback_instantiated_without_convert_has_plain_types_too() -> None:
    config = compose("experiment=tiny", "adapter.target_modules=[layers.0]", "+adapter.rank_pattern={layers.0:2}")
    adapter = hydra.utils.instantiate(config.callbacks.lora).config
    values = adapter.to_dict()
    assert not any(OmegaConf.is_config(value) for value in (values, *values.values()))
    assert values["target_modules"] == ["layers.0"]
    assert values["rank_pattern"] == {"layers.0": 2}
