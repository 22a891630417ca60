"""Measure committed rows again, and fail where we have lost 5 %: ``python -m benchmarks.guard``.

Ratios to PEFT in the same process are compared, not seconds, so that a record from another day still serves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import models, step

LOST = 0.05
RECORDS = Path(__file__).parent / "results"


def verdict(then: dict[str, Any], now: dict[str, Any]) -> str:
    """``"ok"``, ``"slower"``, ``"keeps more"`` or, where the harness can't be trusted now or then, ``"unsure"``.

    Args:
        then: A row of a record.
        now: The same row, measured now.
    """
    if _saved(now) > (1 + LOST) * _saved(then):
        return "keeps more"
    if not (now["self_test"]["passed"] and then["self_test"]["passed"]):
        return "unsure"
    return "slower" if _time(now)["median"] > (1 + LOST) * _time(then)["median"] else "ok"


def _time(row: dict[str, Any]) -> dict[str, float]:
    ratio: dict[str, float] = row["ratios"]["ours_to_peft"]
    return ratio


def _saved(row: dict[str, Any]) -> float:
    ours, peft = (row["memory"][name]["saved_bytes"] for name in ("ours", "peft"))
    return float(ours / peft)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table. Returns 1 if a row got worse, else 2 if one could not be judged, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("records", nargs="*", type=Path, help="default: results/step-*.json")
    parser.add_argument("--rounds", type=int, help="default: as in the record")
    options = parser.parse_args(arguments)
    view = Table(title=f"ours/PEFT, then and now; lost: more than {LOST:.0%}")
    for heading in ("row", "time then", "time now", "saved then", "saved now", "verdict"):
        view.add_column(heading)
    verdicts = set()
    paths = options.records or sorted(RECORDS.glob("step-*.json"))
    if not paths:
        parser.error(f"no record in {RECORDS}: python -m benchmarks.step --output writes one")
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        torch.set_num_threads(record["threads"])
        settings = {**record["settings"], "rounds": options.rounds or record["settings"]["rounds"]}
        for then in record["rows"]:
            case = models.Case(**then["case"])
            now = step.measure(case, **settings)
            found = verdict(then, now)
            verdicts.add(found)
            name = f"{path.stem}: {case.precision}, {case.targets}, dropout {case.dropout}"
            times = (f"{_time(row)['median']:.3f}" for row in (then, now))
            view.add_row(name, *times, *(f"{_saved(row):.3f}" for row in (then, now)), found)
    Console(width=150).print(view)
    return 1 if verdicts & {"slower", "keeps more"} else 2 if "unsure" in verdicts else 0


if __name__ == "__main__":
    raise SystemExit(main())
