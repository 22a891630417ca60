"""What each of two processes does: forked by test_ddp.py with its rank, it notes the gradients that it got."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.gradient_checkpointing import enable_gradient_checkpointing
from tests.gradient_checkpointing.cases import CASES, build, gradients

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "resnet": ("resnet", {}),
    "stack": ("stack", {}),
    "stack with a search for unused parameters": ("stack", {"find_unused_parameters": True}),
    "stack as a static graph": ("stack", {"static_graph": True}),
}


def step(name: str, options: dict[str, Any], rank: int, *, enabled: bool) -> dict[str, Tensor]:
    """The gradients of a second step, on rows of this rank's own."""
    module = build(name)
    if enabled:
        enable_gradient_checkpointing(module)
    wrapped = DistributedDataParallel(module, **options)
    inputs = {key: value * (1 + rank) % 31 for key, value in CASES[name].inputs().items()}
    for _ in range(2):
        found = gradients(wrapped, inputs)
    return {key: value for key, value in found.items() if value is not None}


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)  # the parent's threads are not there after a fork
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {
        run: [step(name, options, rank, enabled=enabled) for enabled in (False, True)]
        for run, (name, options) in RUNS.items()
    }
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()
