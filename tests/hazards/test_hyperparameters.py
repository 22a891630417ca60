"""Hazard: hyper-parameters that are no plain values: a file that a resume can't open, or the whole base inside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import CheckpointError, load_from_checkpoint
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, lora, metric
from tests.states import adapters_of, read, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:Attribute '(net|settings)' is an instance of `nn.Module`"),
]
omegaconf = pytest.importorskip("omegaconf", reason="OmegaConf comes with Hydra")


@dataclasses.dataclass
class Settings:
    width: int = WIDTH
    names: tuple[str, ...] = ("a", "b")


class WithSettings(TinyModule):
    """Takes one argument more, of any type."""

    def __init__(self, settings: Any, width: int = WIDTH) -> None:
        self.__dict__["given"] = settings  # before Module.__init__
        super().__init__()
        self.save_hyperparameters()

    def build(self) -> None:
        self.hparams.update(dropout=0.0, optimizer="all", seed=0, width=WIDTH)
        super().build()


class Optional(WithSettings):
    def __init__(self, settings: Any = None, width: int = WIDTH) -> None:
        super().__init__(settings, width)


def node(**values: Any) -> Any:
    return omegaconf.OmegaConf.create(values)


def saved(make_trainer: Any, folder: Path, module: TinyModule, **options: Any) -> tuple[str, float]:
    saver = ModelCheckpoint(dirpath=folder, save_weights_only=options.pop("weights_only", False))
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(), saver])
    fit(trainer, module)
    return saver.best_model_path, metric(trainer.test(module, make_loader(), verbose=False))


PLAIN = {
    "dict config": lambda: node(a=1, b=[1, 2], c={"d": "${a}"}),
    "list config": lambda: node(x=[1, 2]).x,
    "path": lambda: Path("data") / "train",
    "path inside": lambda: {"files": [Path("a"), Path("b")]},
    "dict config inside": lambda: {"model": node(a=1)},
    "tensor": lambda: torch.arange(3),
    "none": lambda: None,
}
NOT_PLAIN = {"dataclass": Settings, "module": lambda: nn.Linear(512, 512), "class": lambda: TinyModule, "set": object}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("weights_only", [True, False])
def test_plain_hyperparameters_are_kept_and_resume_and_rebuild(
    make_trainer: Any, tmp_path: Path, kind: str, weights_only: bool
) -> None:
    module = WithSettings(PLAIN[kind]())
    path, score = saved(make_trainer, tmp_path, module, weights_only=weights_only)
    assert "settings" in read(path)["hyper_parameters"]
    twin = load_from_checkpoint(WithSettings, path)
    assert same(adapters_of(twin), adapters_of(module))
    tester = make_trainer(callbacks=[lora()], logger=False)
    assert metric(tester.test(WithSettings(PLAIN[kind]()), make_loader(), ckpt_path=path, verbose=False)) == score
    if not weights_only:
        again = make_trainer(max_epochs=2, callbacks=[lora()])
        fit(again, WithSettings(PLAIN[kind]()), ckpt_path=path)
        assert again.global_step == 4


def test_an_omegaconf_hyperparameter_is_read_by_attribute_again(make_trainer: Any, tmp_path: Path) -> None:
    path, _ = saved(make_trainer, tmp_path, WithSettings(node(a=1, b={"c": [2]})))
    twin = load_from_checkpoint(WithSettings, path)
    assert twin.given.b.c[0] == 2
    assert read(path)["hyper_parameters"]["settings"] == {"a": 1, "b": {"c": [2]}}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_hyperparameters_are_left_out_with_a_warning_and_asked_for(
    make_trainer: Any, tmp_path: Path, kind: str
) -> None:
    module = WithSettings(NOT_PLAIN[kind]())
    with pytest.warns(UserWarning, match="settings are no plain values and are left out"):
        path, _ = saved(make_trainer, tmp_path, module)
    assert "settings" not in read(path)["hyper_parameters"]
    assert Path(path).stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"needs settings.*settings=\.\.\."):
        load_from_checkpoint(WithSettings, path)
    assert same(adapters_of(load_from_checkpoint(WithSettings, path, settings=module.given)), adapters_of(module))
    fit(make_trainer(max_epochs=1, callbacks=[lora()]), WithSettings(module.given))


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_left_out_may_have_a_default(make_trainer: Any, tmp_path: Path, kind: str) -> None:
    module = Optional(NOT_PLAIN[kind]())
    with pytest.warns(UserWarning, match="left out"):
        path, _ = saved(make_trainer, tmp_path, module)
    assert same(adapters_of(load_from_checkpoint(Optional, path)), adapters_of(module))


def test_a_network_among_the_hyperparameters_stays_out_of_the_file(make_trainer: Any, tmp_path: Path) -> None:
    class Around(TinyModule):
        def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.backbone = net

    def network() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, WIDTH))

    module = Around(network())
    with pytest.warns(UserWarning, match="hyper-parameters net are no plain values"):
        path, score = saved(make_trainer, tmp_path, module)
    assert set(read(path)["hyper_parameters"]) >= {"lr"}
    assert Path(path).stat().st_size < 60_000
    twin = load_from_checkpoint(Around, path, net=network())
    assert same(twin.state_dict(), module.state_dict())
    tester = make_trainer(callbacks=[lora()])
    assert metric(tester.test(twin, make_loader(), verbose=False)) == score


def test_a_module_whose_hyperparameters_are_one_omegaconf_node(make_trainer: Any, tmp_path: Path) -> None:
    class Configured(TinyModule):
        def __init__(self, cfg: Any) -> None:
            self.__dict__["cfg"] = cfg
            super().__init__()
            self.hparams.clear()
            self.save_hyperparameters(cfg)

        def build(self) -> None:
            self.hparams.update(self.cfg)
            super().build()

    cfg = node(width=WIDTH, dropout=0.0, optimizer="all", seed=0)
    path, score = saved(make_trainer, tmp_path, Configured(cfg))
    tester = make_trainer(callbacks=[lora()])
    assert metric(tester.test(Configured(cfg), make_loader(), ckpt_path=path, verbose=False)) == score
    assert dict(read(path)["hyper_parameters"]) == dict(cfg)
    assert same(
        adapters_of(load_from_checkpoint(Configured, path)),
        adapters_of(load_from_checkpoint(Configured, path, cfg=cfg)),
    )


class HydraStyle(TinyModule):
    """What a Hydra user writes: one config for all, read by attribute."""

    def __init__(self, cfg: Any) -> None:
        self.__dict__["width"] = cfg.net.width
        super().__init__()
        self.hparams.clear()
        self.save_hyperparameters(cfg)

    def build(self) -> None:
        self.hparams.update(width=self.width, dropout=0.0, optimizer="all", seed=0)
        super().build()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_takes_one_config_is_loaded_again_by_us_and_merged_by_its_own_class(
    make_trainer: Any, tmp_path: Path
) -> None:
    module, callback = HydraStyle(node(net={"width": WIDTH}, lr="${net.width}")), lora(merge=True)
    trainer = make_trainer(callbacks=[callback])
    fit(trainer, module)
    trainer.save_checkpoint(tmp_path / "adapters.ckpt")
    loaded = load_from_checkpoint(HydraStyle, tmp_path / "adapters.ckpt")
    assert isinstance(loaded.hparams, omegaconf.DictConfig)
    assert loaded.hparams.net.width == loaded.hparams.lr == WIDTH
    merged = HydraStyle.load_from_checkpoint(Path(callback.merge_report.folder) / "merged.ckpt", weights_only=True)
    assert same(merged.state_dict(), module.state_dict())


def test_a_config_that_names_what_only_hydra_knows_does_not_stop_the_saves(make_trainer: Any, tmp_path: Path) -> None:
    path, _ = saved(make_trainer, tmp_path, WithSettings(node(a=1, b="${hydra:runtime.cwd}")))
    assert read(path)["hyper_parameters"]["settings"] == {"a": 1, "b": "${hydra:runtime.cwd}"}
    assert load_from_checkpoint(WithSettings, path).given.a == 1


def test_a_datamodules_hyperparameters_do_not_close_the_file(make_trainer: Any, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Data(pl.LightningDataModule):
        def __init__(self, folder: Any, options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return make_loader()

        val_dataloader = train_dataloader

    saver = ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(), saver])
    trainer.fit(TinyModule(), datamodule=Data(Path("data"), node(a=[1])))
    assert read(saver.best_model_path)["datamodule_hyper_parameters"] == {"folder": "data", "options": {"a": [1]}}


def test_the_merged_file_has_plain_hyperparameters_too(make_trainer: Any, tmp_path: Path) -> None:
    module = WithSettings(node(a=1))
    callback = lora(merge=True)
    fit(make_trainer(callbacks=[callback]), module)
    merged = WithSettings.load_from_checkpoint(Path(callback.merge_report.folder) / "merged.ckpt", weights_only=True)
    assert same(merged.state_dict(), module.state_dict())
