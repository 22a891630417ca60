"""What each of two processes does: started by test_ddp.py with its rank, it notes the gradients that it got."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.gradient_checkpointing import enable_gradient_checkpointing
from tests.gradient_checkpointing.cases import CASES, build, gradients

RANK = int(os.environ.get("RANK", "0"))
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "resnet": ("resnet", {}),
    "stack": ("stack", {}),
    "stack with a search for unused parameters": ("stack", {"find_unused_parameters": True}),
    "stack as a static graph": ("stack", {"static_graph": True}),
}


def step(name: str, options: dict[str, Any], *, enabled: bool) -> dict[str, Tensor]:
    """The gradients of a second step, on rows of this rank's own."""
    module = build(name)
    if enabled:
        enable_gradient_checkpointing(module)
    wrapped = DistributedDataParallel(module, **options)
    inputs = {key: value * (1 + RANK) % 31 for key, value in CASES[name].inputs().items()}
    for _ in range(2):
        found = gradients(wrapped, inputs)
    return {key: value for key, value in found.items() if value is not None}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {
        run: [step(name, options, enabled=enabled) for enabled in (False, True)]
        for run, (name, options) in RUNS.items()
    }
    torch.save(results, folder / f"rank{RANK}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
