"""Bytes and seconds of saving: ``python -m benchmarks.checkpoint``.

Lightning with ``LoRACallback`` against plain Lightning around a PEFT model (whose checkpoint holds the whole
base) and against PEFT's own ``save_pretrained`` (which has no optimizer state and can't resume a run). Bytes
are compared with the least that adapters and AdamW's two moments take. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness, models, record, runs

COMPARED = (
    ("ours", "torch.save"),
    ("ours", "lightning+peft"),
    ("ours-weights-only", "torch.save-weights-only"),
    ("ours-weights-only", "lightning+peft-weights-only"),
    ("ours-weights-only", "peft-save_pretrained"),
)


def least_bytes(module: nn.Module) -> dict[str, int]:
    """What the files must hold: 4 bytes a value of A and B; 8 more for AdamW's moments, 4 a step counter."""
    adapters = models.our_adapters(module) or models.peft_adapters(module)
    values = sum(parameter.numel() for parameter in adapters.values())
    return {"adapters": 4 * values, "adapters_and_optimizer": 12 * values + 4 * len(adapters)}


def savers(ours: L.Trainer, peft: L.Trainer, folder: Path) -> dict[str, Callable[[], object]]:
    """The ways to save, by name; each writes to ``folder / name``.

    The two ``torch.save`` ways write what a checkpoint of ours holds and do nothing else: their seconds are
    torch's, and what ours takes above them is Lightning's and this package's part.
    """
    ways: dict[str, Callable[[], object]] = {}
    for suffix, weights_only in (("", False), ("-weights-only", True)):
        ways[f"ours{suffix}"] = partial(ours.save_checkpoint, folder / f"ours{suffix}", weights_only)
        ways[f"ours{suffix}"]()
        content = torch.load(folder / f"ours{suffix}", weights_only=True)
        ways[f"torch.save{suffix}"] = partial(torch.save, content, folder / f"torch.save{suffix}")
        name = f"lightning+peft{suffix}"
        ways[name] = partial(peft.save_checkpoint, folder / name, weights_only)
    ways["ours-twin"] = partial(ours.save_checkpoint, folder / "ours-twin", False)
    wrapped = peft.lightning_module.model
    ways["peft-save_pretrained"] = partial(wrapped.save_pretrained, folder / "peft-save_pretrained")
    return ways


def size(path: Path) -> int:
    """Bytes of a file, or of the tensor files of a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from tensors(child, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from tensors(child, f"{name}/{index}")


def contents(path: Path) -> dict[str, Any]:
    """What a file of ours holds, read as a stranger would: ``torch.load(weights_only=True)``."""
    checkpoint = torch.load(path, weights_only=True)
    found = list(tensors(checkpoint))
    return {
        "frozen_tensors": sum(".adapters." not in name for name in checkpoint["state_dict"]),
        "tensors": len(found),
        "tensor_bytes": sum(tensor.numel() * tensor.element_size() for _, tensor in found),
    }


def measure(case: models.Case, *, rounds: int, clock: str = "wall") -> dict[str, Any]:
    """Sizes, seconds and contents of every way to save, as plain types."""
    ours, peft = runs.fit_ours(case), runs.fit_peft(case)
    gc.collect()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = savers(ours, peft, folder)
        timings = harness.interleave(ways, rounds=rounds, warmup=1, clock=harness.CLOCKS[clock])
        sizes = {way: size(folder / way) for way in ways if way != "ours-twin"}
        held = {way: contents(folder / way) for way in ("ours", "ours-weights-only")}
    least = least_bytes(ours.lightning_module)
    return {
        "case": asdict(case),
        "least_bytes": least,
        "base_bytes": base_bytes(ours.lightning_module),
        "bytes": sizes,
        "above_least": {
            "ours": sizes["ours"] / least["adapters_and_optimizer"] - 1,
            "ours-weights-only": sizes["ours-weights-only"] / least["adapters"] - 1,
            "peft-save_pretrained": sizes["peft-save_pretrained"] / least["adapters"] - 1,
        },
        "contents": held,
        "self_test": timings.self_test("ours-twin", twin="ours", tolerance=0.2).to_dict(),
        "ratios": {f"{way}_to_{other}": timings.ratio(way, to=other).to_dict() for way, other in COMPARED},
        "median_seconds": {way: timings.median(way) for way in ways},
        "least_seconds": {way: min(timings.seconds[way]) for way in ways},
        "seconds": timings.seconds,
    }


def base_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that are not adapters."""
    adapters = {id(parameter) for parameter in models.our_adapters(module).values()}
    return sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in adapters)


def table(row: dict[str, Any], *, clock: str) -> Table:
    """One case for a reader."""
    case = row["case"]
    trust = f"self-test {row['self_test']['median']:.3f}" + ("" if row["self_test"]["passed"] else " FAILED")
    view = Table(title=f"saving, {case['shape']}, rank {case['rank']}, {case['targets']}, {clock} time; {trust}")
    for heading in ("way", "bytes", "above the least", "ms (median)", "ms (least)"):
        view.add_column(heading)
    for way, count in row["bytes"].items():
        above = f"{row['above_least'][way]:+.2%}" if way in row["above_least"] else "-"
        seconds = (row["median_seconds"][way], row["least_seconds"][way])
        view.add_row(way, f"{count:,}", above, *(f"{1000 * second:.1f}" for second in seconds))
    return view


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", choices=list(models.SHAPES))
    parser.add_argument("--targets", nargs="+", default=list(models.TARGETS), choices=list(models.TARGETS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    # Saving waits for the disk, so wall time is what a run loses; on a busy machine it waits for others too.
    parser.add_argument("--clock", choices=list(harness.CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/checkpoint.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every target preset, print the tables, write the record. Returns 1 if a self-test failed."""
    options = parse(arguments)
    environment = record.environment()
    rows = []
    for targets in options.targets:
        case = models.Case(
            shape=options.shape, precision="fp32", targets=targets, rank=options.rank, batch=1, length=16
        )
        rows.append(measure(case, rounds=options.rounds, clock=options.clock))
        Console(width=120).print(table(rows[-1], clock=options.clock))
    if options.output:
        settings = {"clock": options.clock, "rounds": options.rounds}
        content = {"settings": settings, "rows": rows}
        record.write(options.output, benchmark="checkpoint", environment=environment, **content)
    return 0 if all(row["self_test"]["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
