"""Bytes that a step keeps for its backward pass, against PEFT's and the frozen base's: ``python -m benchmarks.saved``.

They are the same on every machine, so that one without bf16 products measures them as well; nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import models, record, tables, training

VARIANTS = ("ours", "peft", "peft-best", "frozen")


def cases(shape: str, batch: int) -> list[models.Case]:
    """Every setting of the step records but the compiled one, of one shape."""
    options: tuple[dict[str, Any], ...] = (
        {"dropout": 0.0},
        {"dropout": 0.05},
        {"precision": "fp32", "dropout": 0.0},
        {"precision": "fp32", "dropout": 0.05},
        {"precision": "bf16-mixed", "dropout": 0.0},
        {"precision": "bf16-mixed", "dropout": 0.05},
        {"precision": "bf16-mixed", "dropout": 0.0, "quantization": "bf16"},
        {"precision": "bf16-mixed", "dropout": 0.05, "quantization": "bf16"},
        {"targets": "q+v"},
        {"layers": "last-half"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "layers": "last-half"},
        {"quantization": "nf4"},
        {"quantization": "nf4", "dropout": 0.05},
        {"quantization": "nf4-double"},
        {"quantization": "nf4-double", "dropout": 0.05},
        {"quantization": "nf4-double", "precision": "fp32"},
        {"quantization": "nf4-double", "precision": "fp32", "dropout": 0.05},
    )
    return [models.Case(shape=shape, batch=batch, **chosen) for chosen in options]


def measure(case: models.Case) -> dict[str, Any]:
    """One row, as plain types."""
    dense = models.build_base(case)
    base = models.as_users_have_it(dense, case)
    builders = {
        "ours": lambda: models.with_ours(dense, case, like=None),
        "peft": lambda: models.with_peft(base, case),
        "peft-best": lambda: models.with_peft(base, case, cast_adapters=False),
        "frozen": lambda: models.frozen_floor(base, case),
    }
    chosen = VARIANTS if case.precision == "bf16" else [name for name in VARIANTS if name != "peft-best"]
    return {"case": asdict(case), "saved_bytes": {name: _saved(builders[name](), case) for name in chosen}}


def _saved(model: nn.Module, case: models.Case) -> int:
    step = training.build_step(model, case, optimizer=False)
    step.forward()
    return training.saved_bytes(step)


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows for a reader."""
    view = Table(title=title)
    for heading in ("setting", *(f"{name} MiB" for name in VARIANTS), "ours / PEFT"):
        view.add_column(heading)
    for row in rows:
        saved = row["saved_bytes"]
        sizes = (f"{saved[name] / 2**20:.2f}" if name in saved else "=" for name in VARIANTS)
        view.add_row(tables.setting(models.Case(**row["case"])), *sizes, f"{saved['ours'] / saved['peft']:.4f}")
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every setting of a shape, print the table, write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saved", description=__doc__)
    parser.add_argument("--shape", default="llama-8x512", choices=list(models.SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--settings", type=int, help="only so many, of the first")
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/saved-llama-8x512.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment, rows = record.environment(), list[dict[str, Any]]()
    for case in cases(options.shape, options.batch)[: options.settings]:
        rows.append(measure(case))
        gc.collect()
        if options.output:
            record.write(options.output, benchmark="saved", environment=environment, rows=rows)
    Console(width=150).print(table(rows, f"kept for the backward pass, {options.shape}, {options.batch} x 256 tokens"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
