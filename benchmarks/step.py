"""Training-step time and memory against PEFT and the frozen base: ``python -m benchmarks.step``.

Forward and backward of one batch (with ``--optimizer``: gradient clipping and AdamW too), every variant over
the same frozen weights and with the same A and B, in one process. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import harness, models, peers, record, training
from lightning_lora.fused import KERNELS


def build_variants(case: models.Case, others: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The models of one row, and those of ``others`` among the peers.

    ``peft-twin`` is ``peft`` built a second time, for the harness's self-test.
    """
    dense = models.build_base(case)
    base = models.as_users_have_it(dense, case)
    peft = models.with_peft(base, case)
    variants = {"peft": peft, "peft-twin": models.with_peft(base, case)}
    if case.precision == "bf16":  # over an fp32 base PEFT has this one mode only
        variants["peft-best"] = models.with_peft(base, case, cast_adapters=False)
    variants |= {name: peers.with_peer(name, base, case, like=peft) for name in others}
    variants["ours"] = models.with_ours(dense, case, like=peft)
    variants["frozen"] = models.frozen_floor(base, case)
    if case.compiled:
        for model in variants.values():
            model.compile()
    return variants


def measure(
    case: models.Case, *, rounds: int, clock: str, optimizer: bool = False, others: Sequence[str] = ()
) -> dict[str, Any]:
    """All figures of one row, as plain types."""
    variants = build_variants(case, others)
    steps = {name: training.build_step(model, case, optimizer=optimizer) for name, model in variants.items()}
    agreed = training.agreement(steps["ours"], steps["peft"], precision=case.precision)
    for name in others:
        training.agreement(steps[name], steps["peft"], precision=case.precision)
    sizes = {name: training.measure_memory(step) for name, step in steps.items() if name != "peft-twin"}
    timings = harness.interleave(steps, rounds=rounds, clock=harness.CLOCKS[clock])
    best = "peft-best" if "peft-best" in steps else "peft"
    return {
        "case": asdict(case),
        "self_test": timings.self_test("peft-twin", twin="peft").to_dict(),
        "relative_difference": agreed,
        "ratios": {
            "ours_to_peft": timings.ratio("ours", to="peft").to_dict(),
            "ours_to_peft_best": timings.ratio("ours", to=best).to_dict(),
            "ours_to_frozen": timings.ratio("ours", to="frozen").to_dict(),
            "peft_to_frozen": timings.ratio("peft", to="frozen").to_dict(),
            **{f"ours_to_{name}": timings.ratio("ours", to=name).to_dict() for name in others},
        },
        "memory": sizes,
        "median_seconds": {name: timings.median(name) for name in steps},
        "seconds": timings.seconds,
    }


def cases(arguments: argparse.Namespace) -> Iterable[models.Case]:
    """The grid of rows that the command line asks for."""
    grid = itertools.product(arguments.precision, arguments.targets, arguments.dropout)
    for precision, targets, dropout in grid:
        yield models.Case(
            shape=arguments.shape,
            precision=precision,
            dropout=dropout,
            targets=targets,
            rank=arguments.rank,
            batch=arguments.batch,
            length=arguments.length,
            quantization=arguments.quantization,
            layers=arguments.layers,
            gradient_checkpointing=arguments.gradient_checkpointing,
            compiled=arguments.compile,
            kernels=arguments.kernels,
        )


def table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """The rows for a reader; ratios below 1 mean that ours is faster."""
    view = Table(title=title)
    headings = ("precision", "targets", "dropout", "self-test", "ours/PEFT", "ours/PEFT best", "ours/frozen")
    others = [name for name in peers.PEERS if f"ours_to_{name}" in rows[0]["ratios"]]
    for heading in (
        *headings,
        *(f"ours/{name}" for name in others),
        "saved MiB ours | PEFT | best",
        "peak MiB ours | PEFT | best",
    ):
        view.add_column(heading)
    for row in rows:
        case, ratios = row["case"], row["ratios"]
        self_test = f"{row['self_test']['median']:.3f}" + ("" if row["self_test"]["passed"] else " FAILED")
        view.add_row(
            *(case["precision"], case["targets"], str(case["dropout"]), self_test),
            *(harness.spread(ratios[name]) for name in ("ours_to_peft", "ours_to_peft_best", "ours_to_frozen")),
            *(harness.spread(ratios[f"ours_to_{name}"]) for name in others),
            *(_mebibytes(row["memory"], field) for field in ("saved_bytes", "peak_bytes")),
        )
    return view


def _mebibytes(sizes: dict[str, dict[str, int]], field: str) -> str:
    names = ("ours", "peft", "peft-best")
    return " | ".join(f"{sizes[name][field] / 2**20:.1f}" if name in sizes else "=" for name in names)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--shape", default="llama-8x512", choices=list(models.SHAPES))
    parser.add_argument("--precision", nargs="+", default=list(models.PRECISIONS), choices=list(models.PRECISIONS))
    parser.add_argument("--targets", nargs="+", default=list(models.TARGETS), choices=list(models.TARGETS))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--quantization", choices=[name for name in models.QUANTIZATIONS if name])
    parser.add_argument("--layers", default="all", choices=models.LAYERS)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute every block in backward")
    parser.add_argument("--compile", action="store_true", help="compile every variant")
    parser.add_argument("--kernels", default="torch", choices=KERNELS, help="of ours, see LoRAConfig")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(harness.CLOCKS), help="default: cpu if one thread, else wall")
    parser.add_argument("--optimizer", action="store_true", help="include gradient clipping and AdamW")
    parser.add_argument(
        "--peers", action="store_true", help="LitGPT, torchtune and loralib, too, where installed and the base is dense"
    )
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/step.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid, print the table, write the record. Returns 1 if a row failed its self-test."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock = options.clock or ("cpu" if options.threads == 1 else "wall")
    environment = record.environment()
    settings = {"clock": clock, "rounds": options.rounds, "optimizer": options.optimizer}
    others = peers.installed() if options.peers and options.quantization is None else []
    rows: list[dict[str, Any]] = []
    for case in cases(options):
        rows.append(measure(case, rounds=options.rounds, clock=clock, optimizer=options.optimizer, others=others))
        gc.collect()
        if options.output:  # after every row: a grid takes long, and its first rows are worth keeping
            record.write(options.output, benchmark="step", environment=environment, settings=settings, rows=rows)
    what = "forward + backward + clip + AdamW" if options.optimizer else "forward + backward"
    sizes = f"{options.shape}, {options.batch}x{options.length} tokens, rank {options.rank}"
    sizes += f", {options.quantization} base" if options.quantization else ""
    sizes += f", {options.layers} of the layers" if options.layers != "all" else ""
    sizes += ", recomputed" if options.gradient_checkpointing else ""
    sizes += ", compiled" if options.compile else ""
    Console(width=170).print(table(rows, title=f"{what}, {sizes}, {clock} time"))
    return 0 if all(row["self_test"]["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
