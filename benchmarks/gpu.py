"""Everything that needs a GPU, in one run: ``python -m benchmarks.gpu --output benchmarks/results/gpu.json``.

Checks the fused layer against torch's own operations, checks and times Triton's kernels, times training steps of
7B-shaped layers (dense and 4-bit) against PEFT and the frozen base with their peak memory, and trains a whole 7B shape
in 4 bits beside its plan. Each part is written as soon as it is done. ``--tiny`` runs the same on a CPU in seconds
(with ``TRITON_INTERPRET=1`` the kernels, too, but no step with them).
"""

from __future__ import annotations

import argparse
import gc
import os
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
from lightning_lora.fused.draw import KERNELS, draw_dropout
from lightning_lora.fused.dropout import Pull
from lightning_lora.fused.products import Update
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


def check_kernels(device: torch.device, *, tokens: int, widths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Triton's kernels against their definition with the same mask, and their time against torch's own operations."""
    rows = []
    for width in widths:
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
            x, inner, small_A = (
                torch.randn(shape, device=device, dtype=dtype) for shape in ((tokens, width), (tokens, 16), (16, width))
            )
            with torch.no_grad():
                found, expected = _kernel_passes(x, inner, small_A)
            steps = {name: _passes(name, x, inner, small_A) for name in KERNELS}
            timings = harness.interleave(
                {name: _finished(step, device) for name, step in steps.items()},
                rounds=rounds,
                clock=harness.CLOCKS["wall"],
            )
            rows.append(
                {
                    "width": width,
                    "dtype": str(dtype),
                    "largest_difference": max(map(_difference, found, expected)),
                    "time_to_torch": timings.ratio("triton", to="torch").to_dict(),
                }
            )
    return rows


def _kernel_passes(
    x: torch.Tensor, inner: torch.Tensor, small_A: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Projection and both gradients by the kernels, and from the mask that they draw, in fp32."""
    drop = draw_dropout(0.05, like=x, kernels="triton")
    grad_A, grad_input = drop.pull_back(Pull(Update(inner, small_A), x, gathered=x.clone()))
    mask = drop.keep(torch.ones_like(x)).float()
    assert grad_A is not None
    assert grad_input is not None
    expected = [
        (x.float() * mask) @ small_A.float().t(),
        inner.float().t() @ (x.float() * mask),
        x.float() + (inner.float() @ small_A.float()) * mask,
    ]
    return [drop.project(x, small_A), grad_A, grad_input], expected


def _passes(kernels: str, x: torch.Tensor, inner: torch.Tensor, small_A: torch.Tensor) -> Callable[[], None]:
    gathered = x.clone()

    @torch.no_grad()
    def run() -> None:
        drop = draw_dropout(0.05, like=x, kernels=kernels)
        drop.project(x, small_A)
        drop.pull_back(Pull(Update(inner, small_A), x, gathered=gathered))

    return run


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
    if not options.tiny or os.environ.get("TRITON_INTERPRET") == "1":
        tokens, widths = (70, (200,)) if options.tiny else (8192, (4096, 11008))
        parts["kernels"] = lambda: check_kernels(device, tokens=tokens, widths=widths, rounds=options.rounds)
    cases = {
        "dense": STEP,
        "dense, dropout": replace(STEP, dropout=0.05),
        "dense, dropout, triton": replace(STEP, dropout=0.05, kernels="triton"),
        "nf4": replace(STEP, quantization="nf4-double"),
    }
    if options.tiny:
        del cases["dense, dropout, triton"]
    for name, case in cases.items():
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
