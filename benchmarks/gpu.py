"""Everything that needs a GPU, in one run: ``python -m benchmarks.gpu --output benchmarks/results/gpu.json``.

Checks the fused layer against torch's own operations, times training steps of 7B-shaped layers (dense and 4-bit)
against PEFT and the frozen base with their peak memory, and trains a whole 7B shape in 4 bits beside its plan. Each
part is written as soon as it is done. ``--tiny`` runs the same on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import harness, models, record, training
from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters
from lightning_lora.device_memory import PeakMeter
from lightning_lora.planning import TokenBatch, plan_memory

STEP = models.Case(shape="llama-7b-4-layers", precision="bf16", batch=4, length=2048)
WHOLE = models.Case(
    shape="llama-7b", precision="bf16", batch=1, length=2048, quantization="nf4-double", gradient_checkpointing=True
)
TINY = {"shape": "tiny", "batch": 2, "length": 32, "rank": 4}


def check_layers(device: torch.device) -> list[dict[str, Any]]:
    """Relative differences of values and gradients between one node and torch's own operations, for one layer."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for quantization in (None, QuantizationConfig(), QuantizationConfig(quant_type="int8")):
            found = [_layer(device, dtype, quantization, plain=plain) for plain in (False, True)]
            differences = [_difference(a, b) for a, b in zip(*found, strict=True)]
            form = "dense" if quantization is None else quantization.quant_type
            rows.append({"dtype": str(dtype), "base": form, "largest_difference": max(differences)})
    return rows


def _layer(
    device: torch.device, dtype: torch.dtype, quantization: QuantizationConfig | None, *, plain: bool
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 768)).to(device, dtype)
    inject_adapters(net, LoRAConfig(rank=16, target_modules=["0"]), quantization=quantization)
    adapter = net.get_submodule("0.adapters.default")
    nn.init.normal_(adapter.lora_B, std=0.02)
    if plain:
        adapter.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 256, 512, device=device, dtype=dtype, requires_grad=True)
    output = net(x)
    output.float().square().mean().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in adapter.parameters())]


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def time_step(case: models.Case, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Ratios of wall time and peak bytes of one case."""
    inputs = _inputs(case, device)
    steps = {name: training.TrainingStep(model, inputs, False) for name, model in _variants(case, device).items()}
    peaks = {name: _peak(step, device) for name, step in steps.items()}
    timings = harness.interleave(
        {name: _finished(step, device) for name, step in steps.items()}, rounds=rounds, clock=harness.CLOCKS["wall"]
    )
    return {
        "case": asdict(case),
        "self_test": timings.self_test("peft-twin", twin="peft").to_dict(),
        "time_to_peft": timings.ratio("ours", to="peft").to_dict(),
        "time_to_peft_best": timings.ratio("ours", to="peft-best").to_dict(),
        "time_to_frozen": timings.ratio("ours", to="frozen").to_dict(),
        "median_seconds": {name: timings.median(name) for name in steps},
        "peak_bytes": peaks,
    }


def _inputs(case: models.Case, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in case.inputs().items()}


def _variants(case: models.Case, device: torch.device) -> dict[str, nn.Module]:
    dense = _base(case, device)
    base = models.as_users_have_it(dense, case)
    peft = models.with_peft(base, case)
    return {
        "peft": peft,
        "peft-twin": models.with_peft(base, case),
        "peft-best": models.with_peft(base, case, cast_adapters=False),
        "ours": models.with_ours(dense, case, like=peft),
        "frozen": models.frozen_floor(base, case),
    }


def _finished(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _peak(step: training.TrainingStep, device: torch.device) -> int | None:
    """Most bytes during a step above those before it."""
    step()
    step.clear()
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    meter = PeakMeter(device)
    meter.start(())
    step()
    found = meter.stop()
    return None if found is None else found - held


def train_whole(case: models.Case, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Peak bytes and seconds of a whole model in 4 bits with recomputation and AdamW, ours and PEFT's, and the plan."""
    plan = plan_memory(
        models.SHAPES[case.shape].config(),
        LoRAConfig(rank=case.rank, target_modules=case.linear),
        batch=TokenBatch(case.batch, case.length),
        quantization=QuantizationConfig(**models.QUANTIZATIONS[case.quantization]),
        gradient_checkpointing=True,
        precision="bf16-true",
    )
    found: dict[str, Any] = {"case": asdict(case), "planned_peak": plan.peak, "planned_parts": plan.parts}
    for name in ("ours", "peft"):
        gc.collect()
        found[name] = _trained(_one(case, name, device), case, device, steps=steps)
    return found


def _base(case: models.Case, device: torch.device) -> nn.Module:
    with device:
        return models.build_base(case)


def _one(case: models.Case, name: str, device: torch.device) -> nn.Module:
    base = _base(case, device)
    if name == "peft":
        return models.with_peft(models.as_users_have_it(base, case), case)
    return models.with_ours(base, case, like=None)


def _trained(model: nn.Module, case: models.Case, device: torch.device, *, steps: int) -> dict[str, Any]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    optimizer = torch.optim.AdamW(training.trainable(model), lr=1e-4, fused=True)
    step = training.TrainingStep(model, _inputs(case, device), False, optimizer)
    step()
    meter = PeakMeter(device)
    meter.start((*model.parameters(), *model.buffers()))
    step()
    peak = meter.stop()
    timings = harness.interleave({"step": _finished(step, device)}, rounds=steps, clock=harness.CLOCKS["wall"])
    return {"peak_bytes": peak, "median_seconds": timings.median("step"), "loss": step.forward().item()}


@contextmanager
def _noted(content: dict[str, Any], part: str) -> Iterator[None]:
    """A part that fails is noted, and the others still run: the machine is lent for minutes."""
    try:
        yield
    except Exception:  # whatever a kernel or a peer does on a device that this was never run on
        content[part] = {"failed": traceback.format_exc()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part, and write the record after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.tiny else "cuda")
    changes = TINY if options.tiny else {}
    content: dict[str, Any] = {"device": "cpu" if options.tiny else torch.cuda.get_device_name()}
    environment = record.environment()
    parts: dict[str, Callable[[], Any]] = {"layers": lambda: check_layers(device)}
    for name, case in {
        "dense": STEP,
        "dense, dropout": replace(STEP, dropout=0.05),
        "nf4": replace(STEP, quantization="nf4-double"),
    }.items():
        tested = replace(case, **changes)
        parts[name] = lambda tested=tested: time_step(tested, device, rounds=options.rounds)
    parts["whole"] = lambda: train_whole(replace(WHOLE, **changes), device, steps=options.rounds)
    for name, part in parts.items():
        with _noted(content, name):
            content[name] = part()
        record.write(options.output, benchmark="gpu", environment=environment, **content)
        print(name, "failed" if "failed" in content[name] else "done", flush=True)
    return int(any("failed" in content[name] for name in parts))


if __name__ == "__main__":
    raise SystemExit(main())
