"""Host memory of quantizing a base as it is read: ``python -m benchmarks.quantize``.

A random Llama of more than 1 GB in bf16 is written as sharded safetensors; a fresh process builds it without values and
streams it in, each layer quantized as it is read. Bytes are compared with the plan's; the peak of the process' memory
(resident, files mapped included) with the quantized size and the largest tensor. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record
from lightning_lora import LoRAConfig, QuantizationConfig, TokenBatch, empty_weights, inject_adapters, plan_memory

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4-double": {"quant_type": "nf4", "double_quant": True},
    "nf4-double-clipped": {"quant_type": "nf4", "double_quant": True, "block_size": 32, "clip_search": True},
    "fp4": {"quant_type": "fp4"},
    "int8": {"quant_type": "int8"},
}
ADAPTERS = LoRAConfig(rank=1, target_modules=("q_proj",))


def shape(layers: int) -> LlamaConfig:
    """A Llama with layers of 23 MB in bf16."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8000,
        tie_word_embeddings=True,
    )


def resident() -> int:
    """Bytes of this process in memory: its own, and files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * sum(int(found[key]) for key in ("RssAnon", "RssFile"))


class Watch:
    """The most that :func:`resident` was within this context."""

    def __enter__(self) -> Watch:
        self.peak, self._done = resident(), False
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done:
            self.peak = max(self.peak, resident())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._done = True
        self._thread.join()


def stream(folder: Path, form: str, layers: int) -> dict[str, Any]:
    """Quantize the base while it is read; to be run in a process of its own."""
    quantization = QuantizationConfig(**FORMS[form])
    warm = torch.nn.Sequential(torch.nn.Linear(64, 64))
    inject_adapters(warm, LoRAConfig(rank=1), quantization=quantization)  # what the libraries load counts before
    with empty_weights():
        model = LlamaForCausalLM(shape(layers)).bfloat16()
    before, started = resident(), time.perf_counter()
    with Watch() as watch:
        inject_adapters(model, ADAPTERS, quantization=quantization, base_weights=folder)
    seconds = time.perf_counter() - started
    return {"peak": watch.peak - before, "held": resident() - before, "seconds": seconds, "bytes": stored(model)}


def stored(model: torch.nn.Module) -> int:
    """Bytes of the base: codes, scales and what stays dense; each tied tensor once."""
    from lightning_lora.quantized_layer import QuantizedLayer

    scales = [t for m in model.modules() if isinstance(m, QuantizedLayer) for t in m.constants().values()]
    return sum(t.nbytes for name, t in model.named_parameters() if ".adapters." not in name) + sum(
        t.nbytes for t in scales
    )


def measure(folder: Path, form: str, layers: int) -> dict[str, Any]:
    """One row."""
    command = [sys.executable, "-m", "benchmarks.quantize", "--stream", str(folder), "--form", form]
    result = subprocess.run([*command, "--layers", str(layers)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    plan = plan_memory(
        shape(layers),
        ADAPTERS,
        batch=TokenBatch(1, 8),
        quantization=QuantizationConfig(**FORMS[form]),
        precision="bf16-true",
    )
    largest = max(p.nbytes for p in empty_model(layers).parameters())
    planned = plan.base.total
    return {
        "form": form,
        "planned_bytes": planned,
        **found,
        "bytes_to_plan": found["bytes"] / planned,
        "peak_above_bytes_in_largest": (found["peak"] - found["bytes"]) / largest,
        "largest": largest,
    }


def empty_model(layers: int) -> LlamaForCausalLM:
    """The base in bf16, without values."""
    with empty_weights():
        return LlamaForCausalLM(shape(layers)).bfloat16()


def table(rows: Sequence[dict[str, Any]], dense: int) -> Table:
    """The rows for a reader."""
    view = Table(title=f"a base of {dense / 1e9:.2f} GB in bf16, quantized while it is read")
    for heading in ("form", "MB", "to plan", "peak MB", "peak above it, in largest tensors", "seconds"):
        view.add_column(heading)
    for row in rows:
        figures = (row["bytes"] / 1e6, row["bytes_to_plan"], row["peak"] / 1e6, row["peak_above_bytes_in_largest"])
        view.add_row(row["form"], *(f"{figure:.3f}" for figure in figures), f"{row['seconds']:.1f}")
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the base, measure every format, print the table, write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--form", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/quantize.json")
    options = parser.parse_args(arguments)
    if options.stream:
        print(json.dumps(stream(options.stream, options.form[0], options.layers)))
        return 0
    environment = record.environment()
    dense = sum(p.nbytes for p in empty_model(options.layers).parameters())
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        LlamaForCausalLM(shape(options.layers)).bfloat16().save_pretrained(name, max_shard_size="300MB")
        rows = [measure(Path(name), form, options.layers) for form in options.form]
    Console(width=140).print(table(rows, dense))
    if options.output:
        record.write(options.output, benchmark="quantize", environment=environment, dense_bytes=dense, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
