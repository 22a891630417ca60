"""What a merge of a really trained QLoRA adapter keeps: ``python -m benchmarks.merge_bases CHECKPOINT``.

Takes a checkpoint of ``lightning-lora train experiment=demo quantization=...``, tests its adapters live over the
quantized base, then merged into each base, and prints error per layer and task metrics. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks import record
from lightning_lora import MergeConfig, MergeReport, load_from_checkpoint, merge_adapters, unmerge_adapters
from lightning_lora.merging import BASES, measure_merge
from lightning_lora.sft import CompanyMessages, SFTModule


def write_original(folder: Path, pretrained: str) -> Path:
    """The dense base as safetensors; the demo's weights come from a package in another format."""
    path = folder / "original.safetensors"
    model = SFTModule(pretrained=pretrained).model
    shared = {key for key, value in model.state_dict().items() if key == "lm_head.weight"}
    save_file({key: value for key, value in model.state_dict().items() if key not in shared}, path)
    return path


def instruction() -> str:
    """The one that the demo trains with."""
    folder = resources.files("lightning_lora.conf") / "data" / "company_messages.yaml"
    return str(OmegaConf.load(str(folder)).instruction)


def scores(module: SFTModule, data: CompanyMessages) -> dict[str, float]:
    """The demo's test metrics."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return {key.removeprefix("test/"): float(value) for key, value in found.items()}


def errors(report: MergeReport) -> dict[str, Any]:
    """Per layer and over all: in units of the update."""
    shares = [layer.update / layer.weight for layer in report.layers]
    return {
        "relative_error": report.relative_error,
        "median_error": statistics.median(layer.error for layer in report.layers),
        "worst_error": report.max_relative_error,
        "median_shift": statistics.median(layer.shift for layer in report.layers),
        "median_update_share": statistics.median(shares),
        "layers": [asdict(layer) for layer in report.layers],
    }


def measure(checkpoint: Path, *, test_size: int) -> list[dict[str, Any]]:
    """One row for the live adapters and one for each base."""
    module = load_from_checkpoint(SFTModule, checkpoint)
    pretrained = module.hparams["pretrained"]
    data = CompanyMessages(pretrained=pretrained, instruction=instruction(), test_size=test_size, eval_batch_size=100)
    rows: list[dict[str, Any]] = [{"base": "live", "scores": scores(module, data)}]
    live = [sample["answer"] for sample in module.samples]
    with tempfile.TemporaryDirectory() as folder:
        original = str(write_original(Path(folder), pretrained))
        for base in BASES:
            # Quantizing again is what the tolerance is there to refuse.
            config = MergeConfig(base=base, original=original if base == "original" else None, tolerance=100.0)
            found = errors(measure_merge(module, config))
            merge_adapters(module, config)
            tested = scores(module, data)
            same = sum(a == b["answer"] for a, b in zip(live, module.samples, strict=True))
            unmerge_adapters(module)
            rows.append({"base": base, "scores": tested, "same_answers": same / len(live), **found})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a reader."""
    view = Table(title="a trained adapter, merged")
    names = list(rows[0]["scores"])
    for heading in ("base", "error of update (all)", "worst layer", "base moved by", *names, "same answers"):
        view.add_column(heading)
    for row in rows:
        figures = [
            f"{row[key]:.2e}" if key in row else "-" for key in ("relative_error", "worst_error", "median_shift")
        ]
        same = f"{row['same_answers']:.0%}" if "same_answers" in row else "-"
        view.add_row(row["base"], *figures, *(f"{row['scores'][name]:.4f}" for name in names), same)
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_bases", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--test-size", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/merge_bases.json")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    environment = record.environment()
    rows = measure(options.checkpoint, test_size=options.test_size)
    Console(width=160).print(table(rows))
    if options.output:
        record.write(options.output, benchmark="merge_bases", environment=environment, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
