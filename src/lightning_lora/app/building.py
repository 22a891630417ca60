"""From a composed configuration to objects. Plain types only: no OmegaConf container gets past this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from lightning_lora import LoRACallback


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that takes part in one run."""

    model: LightningModule
    data: LightningDataModule
    callbacks: list[Callback]
    trainer: Trainer
    report: Any | None

    @property
    def lora(self) -> LoRACallback:
        """The LoRA callback.

        Raises:
            ValueError: If no callback is one.
        """
        for callback in self.callbacks:
            if isinstance(callback, LoRACallback):
                return callback
        raise ValueError("no LoRACallback among `callbacks`: choose callbacks=default, or leave `report` out.")


def build(node: Any) -> Any:
    """Instantiate one node of the configuration, with plain lists and dicts inside."""
    return instantiate(node, _convert_="all")


def build_loggers(config: DictConfig) -> list[Logger]:
    """Instantiate the loggers: ``config.logger`` is a dictionary of them, or null."""
    return _build_named(config.get("logger"))


def build_run(config: DictConfig, *, loggers: list[Logger]) -> Run:
    """Instantiate data, model, callbacks, trainer and report, in this order."""
    data = build(config.data)
    model = build(config.model)
    callbacks = _build_named(config.get("callbacks"))
    # Lightning makes a CSVLogger of its own where it gets an empty list or None.
    trainer = instantiate(config.trainer, _convert_="all", callbacks=callbacks, logger=loggers or False)
    return Run(model=model, data=data, callbacks=callbacks, trainer=trainer, report=build(config.get("report")))


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the configuration resolved, as plain dicts, lists and numbers."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if not isinstance(container, dict):
        raise ValueError(f"the configuration must be a mapping, got {type(container).__name__}.")
    return {str(key): value for key, value in container.items()}


def _build_named(group: DictConfig | None) -> list[Any]:
    """Instantiate the values of a group of named objects; a null value switches one off."""
    nodes = {str(name): node for name, node in (group or {}).items() if node}
    for name, node in nodes.items():
        if "_target_" not in node:
            raise ValueError(
                f"{name!r} has settings ({', '.join(map(str, node))}) and no _target_: the chosen option of its group "
                f"does not define it. Choose one that does (callbacks=default, logger=csv), or set it to null."
            )
    return [build(node) for node in nodes.values()]
