"""Folding adapters into their base, against PEFT: ``python -m benchmarks.merge``.

Every round builds all models anew over one set of weights; building is not timed. Ours proves each layer, and keeps the
base for an exact way back or, with ``keep_base=False``, proves all layers before it folds the first. PEFT does
neither.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import harness, memory, models, record
from lightning_lora import MergeConfig, merge_adapters

MERGES: dict[str, Callable[[Any], object]] = {
    "peft": lambda model: model.merge_and_unload(),
    "peft-twin": lambda model: model.merge_and_unload(),
    "ours": merge_adapters,
    "ours-for-good": lambda model: merge_adapters(model, MergeConfig(keep_base=False)),
}


class Merging:
    """One variant: a model of its own for each round, since a merge can be done once."""

    def __init__(self, name: str, base: nn.Module, case: models.Case, adapters: nn.Module) -> None:
        self._name, self._base, self._case, self._adapters = name, base, case, adapters
        self._model: Any = None

    def build(self) -> None:
        """A model over a copy of the base, whose weights a merge may write to."""
        self.drop()
        base = copy.deepcopy(self._base)
        if self._name.startswith("ours"):
            self._model = models.with_ours(base, self._case, like=self._adapters)
        else:
            self._model = models.with_peft(base, self._case)

    def drop(self) -> None:
        """Give the memory back."""
        self._model = None
        gc.collect()

    def __call__(self) -> Any:
        """The merge alone."""
        return MERGES[self._name](self._model)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of what the merge made, by the base's names."""
        plain = self._model if self._name.startswith("ours") else self._model.base_model.model
        return {key: value.clone() for key, value in plain.state_dict().items()}


def measure(case: models.Case, rounds: int) -> dict[str, Any]:
    """One row, as plain types."""
    base = models.build_base(case)
    adapters = models.with_peft(base, case)
    variants = {name: Merging(name, base, case, adapters) for name in MERGES}
    peaks, merged = {}, {}
    for name, variant in variants.items():
        peaks[name] = _peak_above_the_model(variant)
        merged[name] = variant.weights()
    _agree(merged)
    timings = harness.interleave(
        variants, rounds=rounds, warmup=1, before={name: variant.build for name, variant in variants.items()}
    )
    adapted = (layer for name, layer in base.named_modules() if name.endswith(tuple(case.linear)))
    return {
        "shape": case.shape,
        "precision": case.precision,
        "rank": case.rank,
        "self_test": timings.self_test("peft-twin", twin="peft", tolerance=0.1).to_dict(),
        "ratios": {name: timings.ratio(name, to="peft").to_dict() for name in ("ours", "ours-for-good")},
        "peak_bytes_above_the_model": peaks,
        "largest_layer_bytes": max(layer.weight.nbytes for layer in adapted),
        "median_seconds": {name: timings.median(name) for name in variants},
    }


def _peak_above_the_model(variant: Merging) -> int:
    """The build is part of what is recorded: of weights from before it, the record would not show the end."""
    _, model = memory.alive_bytes(variant.build)
    variant.drop()

    def build_and_merge() -> None:
        variant.build()
        variant()

    return memory.peak_bytes(build_and_merge) - model


def _agree(merged: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, state in merged.items():
        for key, value in merged["peft"].items():
            if not torch.allclose(state[key].float(), value.float(), rtol=0.01, atol=1e-3):
                raise RuntimeError(f"{name} and PEFT merge {key} to different weights")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both precisions, print the table, write the record. Returns 1 if a row failed its self-test."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", choices=list(models.SHAPES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/merge.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = record.environment()
    rows = [measure(models.Case(shape=options.shape, precision=p), options.rounds) for p in options.precision]
    view = Table(title=f"merging the adapters of {options.shape}, cpu time")
    for heading in ("precision", "", "seconds", "to PEFT", "peak MiB above the model"):
        view.add_column(heading)
    for row in rows:
        for name in ("peft", "ours", "ours-for-good"):
            ratio = harness.spread(row["ratios"][name]) if name in row["ratios"] else ""
            peak = f"{row['peak_bytes_above_the_model'][name] / 2**20:.1f}"
            view.add_row(row["precision"], name, f"{row['median_seconds'][name]:.3f}", ratio, peak)
    Console(width=150).print(view)
    if options.output:
        settings = {"clock": "cpu", "rounds": options.rounds}
        record.write(options.output, benchmark="merge", environment=environment, settings=settings, rows=rows)
    return 0 if all(row["self_test"]["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
