"""Leave DDP behind at the end of a job, so that the next job of a sweep can start its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

# What Lightning's launcher sets in the main process, and takes for the cluster's word in the next run.
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@contextmanager
def own_process_group() -> Iterator[None]:
    """Within this block a Trainer may set up distributed training; at the end things are as they were."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    initialized = _is_initialized()
    try:
        yield
    finally:
        if _is_initialized() and not initialized:
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
