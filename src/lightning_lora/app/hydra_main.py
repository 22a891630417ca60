"""Hydra's side of ``lightning-lora train``: where the configs are, and the arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_lora.errors import MissingDependencyError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_PATH = "pkg://lightning_lora.conf"
CONFIG_NAME = "train"


def run(arguments: Sequence[str]) -> None:
    """Run the training app with Hydra's command line.

    Args:
        arguments: What follows ``lightning-lora train``: overrides and Hydra's flags (``-m``, ``--cfg job``,
            ``--config-dir``, ``--help``).

    Raises:
        MissingDependencyError: If hydra-core is not installed.
    """
    try:
        import hydra
    except ImportError as error:
        raise MissingDependencyError(
            "`lightning-lora train` needs Hydra. Install it with: pip install 'lightning-lora[hydra]'"
        ) from error
    # Imported here and not in the task: a broken install should fail before Hydra makes a folder.
    from lightning_lora.app.train import train

    @hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=CONFIG_NAME)
    def task(config: DictConfig) -> float | None:
        return train(config)

    # Hydra reads sys.argv: there is no other way in that keeps its multirun and its help.
    sys.argv = ["lightning-lora train", *arguments]
    task()
