"""Loggers that are closed whatever happens: one run a job, and a failed job is shown as failed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


@contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close ``loggers`` at the end of the block, as failed if it raises.

    Lightning finalises its loggers when a stage ends, but not when something fails outside a stage, and it
    never finishes a Weights & Biases run: the next job of a sweep would write into the run of the one before.
    """
    try:
        yield
    except BaseException:
        _close(loggers, failed=True)
        raise
    _close(loggers, failed=False)


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Log the composed configuration, as plain types, to every logger."""
    for logger in loggers:
        logger.log_hyperparams(config)


def _close(loggers: Sequence[Logger], *, failed: bool) -> None:
    """Finalise every logger; one that can't be closed costs neither the others nor the run its result."""
    for logger in loggers:
        try:
            logger.finalize("failed" if failed else "success")
        except Exception as error:
            log.warning("%s could not be closed: %s", type(logger).__name__, error)
    # Only what a logger has imported already can have a run open.
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))
