"""What a training step holds in memory: the bytes that are alive after a part of it, and the peak.

``python -m benchmarks.memory`` compares what ``plan_memory`` predicts with what torch's CPU allocator reports to the
profiler. The two share no code: the prediction counts tensors that have no memory, the measurement real allocations.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from lightning_lora.device_memory import PeakMeter, allocations

MEDIAN_ERROR, WORST_ERROR = 0.05, 0.12  # the most that a plan may be off


def peak_bytes(step: Callable[[], object]) -> int:
    """Largest number of bytes alive at once during ``step``, above what was alive before it.

    Read from the profiler's record of every allocation and release in torch's CPU allocator.

    Limits: scratch memory that oneDNN or MKL take by themselves, Python objects and the allocator's own
    rounding are not seen, and memory freed in ``step`` but taken before it lowers the count: clear gradients
    before measuring a step that would clear them first.
    """
    meter = PeakMeter(torch.device("cpu"))
    meter.start(())
    result = step()
    del result
    peak = meter.stop()
    if not peak:
        raise RuntimeError("peak_bytes: the profiler recorded no allocation, this torch build reports none")
    return peak


def alive_bytes(build: Callable[[], Any]) -> tuple[Any, int]:
    """What ``build`` returns, and how many more bytes are alive after it than before."""
    gc.collect()  # else what others left would end meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = build()
        gc.collect()
    return result, sum(allocations(profiler))


@dataclass(frozen=True)
class Setting:
    """One row: what is planned, and then run."""

    model: str
    precision: str = "32-true"
    rank: int = 16
    batch: int = 2
    length: int = 256
    gradient_checkpointing: bool = False
    quantization: str = ""

    def build_model(self) -> nn.Module:
        """A transformers model of random weights; on the device of the context."""
        from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        if self.model == "bert-4x384":
            sizes = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536}
            return BertForMaskedLM(BertConfig(vocab_size=8192, **sizes))
        heads = {"use_cache": False, "attn_implementation": "sdpa"}
        if self.model == "gpt2-6x512":
            return GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=6, n_head=8, n_positions=1024, **heads))
        width, layers, inner, q_heads, kv_heads, vocabulary = _LLAMAS[self.model]
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                intermediate_size=inner,
                num_attention_heads=q_heads,
                num_key_value_heads=kv_heads,
                vocab_size=vocabulary,
                tie_word_embeddings=True,
                **heads,
            )
        )

    def options(self) -> dict[str, Any]:
        """Adapters and format of the base, as ``inject_adapters`` takes them."""
        from lightning_lora import LoRAConfig, QuantizationConfig

        kind, _, double = self.quantization.partition("+")
        quantization = QuantizationConfig(quant_type=kind, double_quant=bool(double)) if kind else None
        return {"config": LoRAConfig(rank=self.rank), "quantization": quantization}


_LLAMAS = {
    "llama-8x512": (512, 8, 1376, 8, 8, 4096),
    "llama-4x384": (384, 4, 1024, 6, 2, 8192),
    "smollm2-135m": (576, 30, 1536, 9, 3, 49152),
}
SETTINGS = (
    Setting("llama-8x512"),
    Setting("llama-8x512", rank=4, batch=4, length=128),
    Setting("llama-8x512", rank=64, gradient_checkpointing=True),
    Setting("llama-8x512", "bf16-true"),
    Setting("llama-8x512", "bf16-true", rank=64, batch=8, length=128),
    Setting("llama-8x512", "bf16-true", batch=1, length=1024, gradient_checkpointing=True),
    Setting("llama-8x512", "bf16-mixed"),
    Setting("llama-8x512", "bf16-mixed", rank=4, gradient_checkpointing=True),
    Setting("gpt2-6x512", batch=2, length=256),
    Setting("gpt2-6x512", "bf16-true", rank=64, length=512, gradient_checkpointing=True),
    Setting("bert-4x384", batch=4, length=128),
    Setting("bert-4x384", "bf16-true", gradient_checkpointing=True),
    Setting("smollm2-135m", "bf16-true", batch=1),
    Setting("smollm2-135m", "bf16-true", rank=64, batch=2, gradient_checkpointing=True),
    Setting("smollm2-135m", "bf16-mixed", batch=1, length=128),
    Setting("llama-4x384", "bf16-true", quantization="nf4"),
    Setting("llama-4x384", "bf16-true", quantization="nf4+double", gradient_checkpointing=True, batch=4, length=64),
    Setting("llama-4x384", quantization="fp4", rank=64, batch=1, length=64),
    Setting("llama-4x384", "bf16-mixed", quantization="nf4+double", batch=8, length=128),
    Setting("llama-4x384", "bf16-true", quantization="int8", gradient_checkpointing=True),
)


def predict(setting: Setting) -> dict[str, Any]:
    """What ``plan_memory`` says, and the CPU seconds that it took."""
    from lightning_lora.planning import plan_memory

    started = time.process_time()
    with torch.device("meta"):
        model = setting.build_model()
    plan = plan_memory(
        model,
        **setting.options(),
        batch=(setting.batch, setting.length),
        precision=setting.precision,
        gradient_checkpointing=setting.gradient_checkpointing,
    )
    fixed = sum(plan.between_steps.values()) + plan.gradients
    return {
        "peak": plan.peak,
        "between_steps": fixed + plan.step.forward["batch"],
        "seconds": round(time.process_time() - started, 2),
        "parts": plan.parts,
    }


def measure(setting: Setting) -> dict[str, int]:
    """Bytes of a real run between its first two steps, and at the peak of the second."""
    step, between = alive_bytes(lambda: _started_run(setting))
    return {"peak": between + peak_bytes(step), "between_steps": between}


def _started_run(setting: Setting) -> Callable[[], None]:
    """A run after its first step, which made gradients and optimizer state; returns the next step.

    In the order of Lightning: forward, clear the old gradients, backward, optimizer.
    """
    from lightning_lora import inject_adapters
    from lightning_lora.gradient_checkpointing import enable_gradient_checkpointing

    model = setting.build_model()
    if setting.precision == "bf16-true":
        model = model.to(torch.bfloat16)
    inject_adapters(model, **setting.options())
    if setting.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    tokens = torch.randint(1000, (setting.batch, setting.length), generator=torch.Generator().manual_seed(0))
    autocast = setting.precision == "bf16-mixed"

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    return step


def compare(setting: Setting) -> dict[str, Any]:
    """Prediction and measurement of one row; ``error`` of the peak, ``step_error`` of what a step adds alone."""
    predicted, measured = predict(setting), measure(setting)
    step = {key: figures["peak"] - figures["between_steps"] for key, figures in (("p", predicted), ("m", measured))}
    return {
        "setting": asdict(setting),
        "predicted": predicted,
        "measured": measured,
        "error": predicted["peak"] / measured["peak"] - 1,
        "step_error": step["p"] / step["m"] - 1,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median and largest error over all rows."""
    found: dict[str, float] = {}
    for key in ("error", "step_error"):
        errors = [abs(row[key]) for row in rows]
        found |= {f"median_{key}": statistics.median(errors), f"worst_{key}": max(errors)}
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a reader; MB are 10^6 bytes."""
    view = Table(title="peak memory of a training step (forward, backward, AdamW): plan_memory against the allocator")
    for heading in ("model", "precision", "rank", "batch", "recompute", "4/8 bit", "predicted MB", "measured MB"):
        view.add_column(heading, no_wrap=True)
    for heading in ("error", "error of the step alone", "plan CPU s"):
        view.add_column(heading, justify="right")
    for row in rows:
        setting = row["setting"]
        view.add_row(
            *(setting["model"], setting["precision"], str(setting["rank"])),
            f"{setting['batch']} x {setting['length']}",
            *("yes" if setting["gradient_checkpointing"] else "", setting["quantization"]),
            *(f"{row[key]['peak'] / 1e6:.2f}" for key in ("predicted", "measured")),
            *(f"{row[key]:+.2%}" for key in ("error", "step_error")),
            f"{row['predicted']['seconds']:.1f}",
        )
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare every setting, print the table, write the record. Returns 1 if an error is above what is promised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/memory.json")
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args(arguments)
    environment = record.environment()
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        if options.only in setting.model:
            rows.append(compare(setting))
            gc.collect()
    found = summary(rows)
    if options.output:
        record.write(options.output, benchmark="memory", environment=environment, summary=found, rows=rows)
    console = Console(width=170)
    console.print(table(rows))
    console.print({key: f"{value:.3%}" for key, value in found.items()})
    return 0 if found["median_error"] <= MEDIAN_ERROR and found["worst_error"] <= WORST_ERROR else 1


if __name__ == "__main__":
    raise SystemExit(main())
