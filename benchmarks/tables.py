"""The committed step records as one table and one picture: ``python -m benchmarks.tables``.

``docs/benchmarks.md`` holds both; a test compares them with the records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import models

RECORDS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".png")
BEGIN, END = "<!-- steps: python -m benchmarks.tables -->", "<!-- end of steps -->"


@dataclass(frozen=True)
class Row:
    """One setting; times and bytes are ours over the other's."""

    setting: str
    shape: str
    peft: dict[str, float]
    peft_best: float
    floor: float
    saved: float
    peak: float
    peers: dict[str, float]


def read(folder: Path = RECORDS) -> Iterator[Row]:
    """The rows of all step records, by shape and setting; saved bytes, which no machine changes, of newer records."""
    saved = saved_shares(folder)
    for path in sorted(folder.glob("step-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for row in record["rows"]:
            emulated = row["case"]["precision"] != "fp32" and record["machine"]["cpu_capability"] == "AVX2"
            optimizer = record["settings"]["optimizer"]
            notes = ["on a CPU without bf16"] * emulated + ["with clipping and AdamW"] * optimizer
            yield _row(row, saved, notes)


def saved_shares(folder: Path = RECORDS) -> dict[models.Case, float]:
    """Ours over PEFT's, from the records of ``benchmarks.saved``."""
    shares: dict[models.Case, float] = {}
    for path in sorted(folder.glob("saved-*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            shares[models.Case(**row["case"])] = row["saved_bytes"]["ours"] / row["saved_bytes"]["peft"]
    return shares


def _row(row: dict[str, Any], saved: dict[models.Case, float], notes: Sequence[str]) -> Row:
    case, ratios, memory = models.Case(**row["case"]), row["ratios"], row["memory"]
    is_vision = isinstance(models.SHAPES[case.shape], models.VisionShape)
    known = {"ours_to_peft", "ours_to_peft_best", "ours_to_frozen", "peft_to_frozen"}
    return Row(
        setting=", ".join([setting(case), *notes]),
        shape=f"{case.shape}, {case.batch}" if is_vision else f"{case.shape}, {case.batch} x {case.length}",
        peft=ratios["ours_to_peft"],
        peft_best=ratios["ours_to_peft_best"]["median"],
        floor=ratios["ours_to_frozen"]["median"],
        saved=saved.get(replace(case, kernels="torch"), memory["ours"]["saved_bytes"] / memory["peft"]["saved_bytes"]),
        peak=memory["ours"]["peak_bytes"] / memory["peft"]["peak_bytes"],
        peers={name.removeprefix("ours_to_"): value["median"] for name, value in ratios.items() if name not in known},
    )


def setting(case: models.Case) -> str:
    """What tells a row from the others of a shape."""
    parts = [case.precision]
    if case.quantization:
        parts.append(f"{case.quantization} base")
    if case.targets != "all-linear":
        parts.append(f"{case.targets} alone")
    if case.dropout:
        parts.append(f"dropout {case.dropout}")
    if case.layers != "all":
        parts.append(case.layers.replace("-", " "))
    if case.gradient_checkpointing:
        parts.append("recomputed")
    if case.compiled:
        parts.append("compiled")
    if case.kernels != "torch":
        parts.append(f"{case.kernels} kernels")
    return ", ".join(parts)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    peers = sorted({name for row in rows for name in row.peers})
    heads = ["model, batch", "setting", "PEFT", "PEFT, best", *peers, "floor", "saved", "peak"]
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for row in rows:
        peft = f"{row.peft['median']:.2f} [{row.peft['lower']:.2f}-{row.peft['upper']:.2f}]"
        others = [f"{row.peers[name]:.2f}" if name in row.peers else "" for name in peers]
        numbers = [f"{value:.2f}" for value in (row.floor, row.saved, row.peak)]
        lines.append([row.shape, row.setting, peft, f"{row.peft_best:.2f}", *others, *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each setting: ours over PEFT in time and in saved bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row.peft["median"] for row in rows], height=0.38, label="time of a step")
    axes.barh([p + 0.2 for p in places], [row.saved for row in rows], height=0.38, label="bytes saved for backward")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(list(places), [f"{row.shape.split(',')[0]}: {row.setting}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("lightning-lora / PEFT at its defaults; left of 1 is less")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def with_table(page: str, table: str) -> str:
    """The page with its table replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with ``--write`` put it and the picture into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    rows = list(read())
    print(markdown(rows))
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), markdown(rows)), encoding="utf-8")
        draw(rows, PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
