"""Hazard: LightningCLI and Hydra build the callback from text, and hand over containers of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, MergeConfig
from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, trained
from tests.states import read


class TinyData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader()

    val_dataloader = train_dataloader


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls


def run_cli(tmp_path: Path, *args: str) -> Any:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    from lightning.pytorch.cli import LightningCLI

    quiet = ["accelerator=cpu", "devices=1", "max_epochs=1", "logger=false", f"default_root_dir={tmp_path}"]
    quiet += ["enable_progress_bar=false", "enable_model_summary=false", "log_every_n_steps=1"]
    return LightningCLI(
        TinyModule,
        TinyData,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=False,
        args=["fit", *(f"--trainer.{option}" for option in quiet), *args],
    )


ONE = [
    "--trainer.callbacks+=lightning_lora.LoRACallback",
    "--trainer.callbacks.config=lightning_lora.LoRAConfig",
    "--trainer.callbacks.config.rank=3",
    "--trainer.callbacks.config.target_modules=[backbone.0,head]",
    "--trainer.callbacks.config.rank_pattern={head: 1}",
    "--trainer.callbacks.print_report=false",
]


def test_lightning_cli_builds_the_callback_from_arguments(tmp_path: Path) -> None:
    cli = run_cli(tmp_path, *ONE)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, LoRACallback))
    assert {row.name: row.rank for row in callback.report.layers} == {"backbone.0": 3, "head": 1}
    assert trained(cli.model)
    assert is_adapter_only(cli.trainer.checkpoint_callback.best_model_path)


def test_lightning_cli_builds_the_callback_from_a_file_and_resumes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        """
trainer:
  callbacks:
    - class_path: lightning_lora.LoRACallback
      init_args:
        print_report: false
        config:
          class_path: lightning_lora.LoRAConfig
          init_args: {rank: 2, layers: null, target_modules: [all-linear], exclude_modules: [head]}
        merge_on_fit_end:
          class_path: lightning_lora.MergeConfig
          init_args: {source: last}
"""
    )
    cli = run_cli(tmp_path, f"--config={file}")
    path = cli.trainer.checkpoint_callback.best_model_path
    assert is_adapter_only(path)
    assert (tmp_path / "merged" / "merged.ckpt").is_file()
    again = run_cli(tmp_path, f"--config={file}", f"--ckpt_path={path}", "--trainer.max_epochs=2")
    assert again.trainer.global_step == 4


@pytest.fixture
def instantiate() -> Any:
    return pytest.importorskip("hydra.utils", reason="needs Hydra").instantiate


CONFIG = {"rank": 3, "target_modules": ["backbone.0", "head"], "layers": None, "rank_pattern": {"head": 1}}
HYDRA = {
    "nested node without target": {"config": CONFIG, "merge_on_fit_end": {"source": "last"}},
    "nested node with target": {
        "config": {"_target_": "lightning_lora.LoRAConfig", **CONFIG},
        "merge_on_fit_end": {"_target_": "lightning_lora.MergeConfig"},
    },
}


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
@pytest.mark.parametrize("kind", HYDRA)
def test_hydra_builds_the_callback(
    make_trainer: Any, instantiate: Any, tmp_path: Path, kind: str, convert: str
) -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        {"_target_": "lightning_lora.LoRACallback", "print_report": False, "_convert_": convert, **HYDRA[kind]}
    )
    callback = instantiate(node)
    assert callback.config == LoRAConfig(**{**CONFIG, "target_modules": ("backbone.0", "head")})
    assert callback.merge_config == MergeConfig()
    saver = ModelCheckpoint(dirpath=tmp_path / "saved")
    fit(make_trainer(enable_checkpointing=True, callbacks=[callback, saver]), TinyModule())
    found = read(saver.best_model_path)
    assert not [name for name in types_in(found) if name.startswith("omegaconf")]
    assert callback.report is not None


def test_hydra_lists_of_layers_and_ranges_arrive_as_plain_values(instantiate: Any) -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        {
            "_target_": "lightning_lora.LoRAConfig",
            "layers": [0, "2-3", -1],
            "modules_to_save": ["head"],
            "alpha": "${.rank}",
            "rank": 4,
            "alpha_pattern": {"head": 2},
        }
    )
    config = instantiate(node)
    assert config == LoRAConfig(
        rank=4, alpha=4, layers=(0, "2-3", -1), modules_to_save=("head",), alpha_pattern={"head": 2}
    )
    assert not [name for name in types_in(config.to_dict()) if name.startswith("omegaconf")]


def test_unknown_fields_are_refused_by_name(instantiate: Any) -> None:
    with pytest.raises(Exception, match="ranks"):
        instantiate({"_target_": "lightning_lora.LoRACallback", "config": {"ranks": 3}})


def types_in(value: Any) -> set[str]:
    """Names of the modules that the types inside a nested value come from."""
    inside = list(value.values()) + list(value) if isinstance(value, dict) else []
    inside += list(value) if isinstance(value, (list, tuple, set)) else []
    return {type(value).__module__}.union(*(types_in(item) for item in inside))
