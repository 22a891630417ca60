"""The twin of ``load_from_checkpoint``: the module with its base, its adapters, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_lora import (
    AdapterMismatchError,
    BaseMismatchError,
    CheckpointError,
    LoRACallback,
    LoRAConfig,
    disable_adapters,
    inject_adapters,
    load_from_checkpoint,
)
from lightning_lora.load import config_from_dict
from tests.conftest import TinyModule, make_loader

MakeTrainer = Callable[..., pl.Trainer]


@pytest.fixture
def train(make_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., Path]:
    def run(module: pl.LightningModule, config: LoRAConfig | None = None, *, weights_only: bool = False) -> Path:
        callback = LoRACallback(config or LoRAConfig(rank=2, alpha=4), print_report=False)
        trainer = make_trainer(callbacks=[callback], num_sanity_val_steps=0)
        trainer.fit(module, make_loader(), make_loader())
        trainer.save_checkpoint(tmp_path / "adapters.ckpt", weights_only=weights_only)
        return tmp_path / "adapters.ckpt"

    return run


def test_the_loaded_module_gives_the_same_outputs(train: Callable[..., Path]) -> None:
    module = TinyModule(dropout=0.5)
    path = train(module, LoRAConfig(rank=2, dropout=0.3, modules_to_save=["head"], rank_pattern={"backbone.3": 3}))
    loaded = load_from_checkpoint(TinyModule, path)
    assert loaded is not module
    assert loaded.hparams == module.hparams
    state = loaded.state_dict()
    assert list(state) == list(module.state_dict())
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    x = torch.randn(3, 16)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in module.named_parameters() if p.requires_grad
    }


def test_a_weights_only_file_will_do(train: Callable[..., Path]) -> None:
    module = TinyModule()
    loaded = load_from_checkpoint(TinyModule, train(module, weights_only=True))
    x = torch.randn(3, 16)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_the_class_is_as_it_was_afterwards_also_after_an_error(train: Callable[..., Path]) -> None:
    path, before = train(TinyModule()), dict(TinyModule.__dict__)
    load_from_checkpoint(TinyModule, path)
    assert dict(TinyModule.__dict__) == before
    with pytest.raises(BaseMismatchError):
        load_from_checkpoint(TinyModule, path, seed=3)
    assert dict(TinyModule.__dict__) == before


class Noting(TinyModule):
    """Its own hook sees the completed checkpoint."""

    seen: list[str] | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = sorted(checkpoint["state_dict"])


def test_an_own_hook_of_the_class_runs_and_stays(train: Callable[..., Path]) -> None:
    path, hook = train(Noting()), Noting.on_load_checkpoint
    loaded = load_from_checkpoint(Noting, path)
    assert loaded.seen is not None
    assert "backbone.0.weight" in loaded.seen
    assert "backbone.0.adapters.default.lora_A" in loaded.seen
    assert Noting.on_load_checkpoint is hook


class Inheriting(Noting):
    pass


def test_an_inherited_hook_stays_inherited(train: Callable[..., Path]) -> None:
    loaded = load_from_checkpoint(Inheriting, train(Inheriting()))
    assert loaded.seen is not None
    assert "on_load_checkpoint" not in Inheriting.__dict__


def test_arguments_replace_hyperparameters(train: Callable[..., Path]) -> None:
    path = train(TinyModule())
    assert load_from_checkpoint(TinyModule, path, dropout=0.25).hparams["dropout"] == 0.25
    with pytest.raises(AdapterMismatchError, match=r"lora_A is \(2, 16\) in the file and \(2, 8\) here"):
        load_from_checkpoint(TinyModule, path, width=8)


lightning_s_own_advice = pytest.mark.filterwarnings("ignore:Attribute 'activation' is an instance of `nn.Module`")


class Composed(TinyModule):
    """Takes a module and an OmegaConf node, as Hydra builds it."""

    def __init__(self, activation: nn.Module, settings: DictConfig, path: Path) -> None:
        super().__init__()
        self.backbone[1] = activation
        self.power = settings.power


@pytest.fixture
def composed(train: Callable[..., Path]) -> Path:
    settings = OmegaConf.create({"power": 2, "list": [1, 2]})
    with pytest.warns(UserWarning, match="hyper-parameters activation are no plain values"):
        return train(Composed(nn.ReLU(), settings, Path("a/b")))


@lightning_s_own_advice
def test_an_argument_that_the_file_cannot_hold_is_asked_for_by_name(composed: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"Composed needs activation, .*load_from_checkpoint\(Composed, path, act"
    ):
        load_from_checkpoint(Composed, composed)


@lightning_s_own_advice
def test_omegaconf_arguments_come_back_as_omegaconf(composed: Path) -> None:
    loaded = load_from_checkpoint(Composed, composed, activation=nn.ReLU())
    assert loaded.power == 2
    assert isinstance(loaded.hparams["settings"], DictConfig)
    assert loaded.hparams["path"] == "a/b"


def test_two_loads_are_independent(train: Callable[..., Path]) -> None:
    path = train(TinyModule())
    one, other = load_from_checkpoint(TinyModule, path), load_from_checkpoint(TinyModule, path)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1.0)
    assert all(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_loaded_module_trains_on_and_saves_adapters_only(
    train: Callable[..., Path], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    loaded = load_from_checkpoint(TinyModule, train(TinyModule()))
    again = train(loaded)
    state = torch.load(again, weights_only=True)["state_dict"]
    assert all("lora_" in key for key in state)
    assert len(state) == 4


@pytest.mark.parametrize("map_location", ["cpu", torch.device("cpu"), None])
def test_map_location_is_passed_on(train: Callable[..., Path], map_location: Any) -> None:
    assert load_from_checkpoint(TinyModule, train(TinyModule()), map_location=map_location).device.type == "cpu"


def test_a_config_is_rebuilt_from_its_dict() -> None:
    config = LoRAConfig(rank=3, layers=["last-half"], rank_pattern={"a": 2}, init="gaussian")
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "kind None; this version knows lora"),
        ({"kind": "dora"}, "kind 'dora'; this version knows lora"),
        ({"kind": "lora", "rank": 0}, "config in the file is damaged: rank must be"),
        ({"kind": "lora", "colour": 1}, "config in the file is damaged: .*colour"),
    ],
)
def test_a_damaged_config_is_an_error_of_the_file(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_dict(values)


def test_the_adapter_that_acted_at_the_save_acts_after_a_load(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = TinyModule()
    inject_adapters(module, LoRAConfig(rank=2), name="first")
    for layer in (module.backbone[0], module.backbone[3]):
        nn.init.normal_(layer.adapters["first"].lora_B, std=0.1)
    trainer = make_trainer(callbacks=[LoRACallback(LoRAConfig(rank=2, target_modules="0"), print_report=False)])
    trainer.fit(module, make_loader(), make_loader())
    x = torch.randn(3, 16)
    for active in (("default",), ("first",)):
        module.backbone[0].active = active
        trainer.save_checkpoint(tmp_path / f"{active}.ckpt")
        loaded = load_from_checkpoint(TinyModule, tmp_path / f"{active}.ckpt")
        assert loaded.backbone[0].active == active
        assert torch.equal(loaded.eval()(x), module.eval()(x))
    with disable_adapters(module):
        trainer.save_checkpoint(tmp_path / "disabled.ckpt")
    assert load_from_checkpoint(TinyModule, tmp_path / "disabled.ckpt").backbone[0].active == ("default",)
