"""Hydra's side of ``lightning-lora train``: where the configs are, and the arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
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
        _set_arguments(_arguments_of_job(arguments, config))
        return train(config)

    _set_arguments(arguments)
    task()


def _set_arguments(arguments: Sequence[str]) -> None:
    """Make ``sys.argv`` what runs this file with ``arguments``.

    Hydra reads it: there is no other way in that keeps its multirun and its help. And DDP starts its other processes
    with it.
    """
    sys.argv = [str(Path(__file__).resolve()), *arguments]


def _arguments_of_job(arguments: Sequence[str], config: DictConfig) -> list[str]:
    """The arguments that run one job alone: DDP's other processes must not run the whole sweep again."""
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig

    given = vars(get_args_parser().parse_args(list(arguments)))
    flags = [
        word
        for name in ("config_dir", "config_name", "config_path")
        if given.get(name)
        for word in (f"--{name.replace('_', '-')}", given[name])
    ]
    output_dir = Path(config.output_dir).resolve()
    return [*flags, *HydraConfig.get().overrides.task, f'output_dir="{output_dir}"']


if __name__ == "__main__":
    run(sys.argv[1:])
