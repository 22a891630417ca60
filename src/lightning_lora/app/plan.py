"""``lightning-lora plan``: how much memory a run takes, before it is started."""

from __future__ import annotations

import json

from rich.console import Console

from lightning_lora.errors import LightningLoRAError
from lightning_lora.lora import LoRAConfig
from lightning_lora.planning import MemoryPlan, TokenBatch, plan_memory
from lightning_lora.quantization.config import QuantizationConfig


def plan(
    model: str,
    *,
    rank: int,
    target_modules: list[str],
    full: bool,
    batch: int,
    length: int,
    quantization: str | None,
    double_quant: bool,
    gradient_checkpointing: bool,
    optimizer: str,
    precision: str,
    gpu_gb: float | None,
    as_json: bool,
) -> int:
    """Print the plan of a run; returns the exit status: 0, 1 if it does not fit, 2 for wrong arguments.

    Args:
        model: A folder with a ``config.json``, or a name on the Hugging Face hub.
        rank: Of LoRA.
        target_modules: Presets and patterns; none: all linear layers.
        full: Train everything, without adapters.
        batch: Sequences in a batch.
        length: Tokens of a sequence.
        quantization: ``nf4``, ``fp4``, ``int8`` or ``bf16``.
        double_quant: Quantize the constants of 4-bit types, too.
        gradient_checkpointing: Recompute activations.
        optimizer: As in :func:`~lightning_lora.planning.plan_memory`.
        precision: Lightning's.
        gpu_gb: Memory of the device in GB (10^9 bytes).
        as_json: Print JSON.
    """
    console = Console()
    try:
        found = plan_memory(
            model,
            None if full else LoRAConfig(rank=rank, target_modules=tuple(target_modules) or "all-linear"),
            batch=TokenBatch(batch, length),
            quantization=_format(quantization, double_quant),
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
            precision=precision,
        )
        limits = None if gpu_gb is None else _limits(found, gpu_gb)
    except (LightningLoRAError, ValueError) as error:
        Console(stderr=True).print(f"lightning-lora plan: {error}", markup=False, highlight=False)
        return 2
    if as_json:
        console.print_json(json.dumps({**found.to_dict(), **({} if limits is None else {"device": limits})}))
    else:
        console.print(found)
        if limits is not None:
            console.print(_verdict(limits), highlight=False)
    return 0 if limits is None or limits["fits"] else 1


def _format(kind: str | None, double_quant: bool) -> QuantizationConfig | None:
    if kind is None and double_quant:
        raise ValueError("--double-quant needs --quantization nf4 or fp4.")
    return None if kind is None else QuantizationConfig(quant_type=kind, double_quant=double_quant)


def _limits(found: MemoryPlan, gpu_gb: float) -> dict[str, float | int | bool]:
    return {
        "gb": gpu_gb,
        "fits": found.fits(gpu_gb),
        "largest_batch": found.largest("batch", gpu_gb),
        "largest_length": found.largest("length", gpu_gb),
    }


def _verdict(limits: dict[str, float | int | bool]) -> str:
    fits = "fits" if limits["fits"] else "does not fit"
    largest = (
        f"largest batch {limits['largest_batch']}, or largest length {limits['largest_length']}, all else as planned"
    )
    return f"{fits} {limits['gb']:g} GB (10^9 bytes) of tensors; {largest}"
