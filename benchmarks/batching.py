"""What batches of like length, shared rows and chunks of logits are worth: ``python -m benchmarks.batching``.

Trains on the demo's messages, or on a data set of ``../shared/data``, in batches of the same number of examples: the
time of an example in each way of batching, and what the logits keep for the backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness, memory, record
from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.sft import CompanyMessages, E2EJson, SFTModule, SnipsJson
from lightning_lora.sft.batching import BATCHING
from lightning_lora.sft.data import JSONTask
from lightning_lora.sft.encoding import Batch

DATA: dict[str, Callable[..., JSONTask]] = {
    "company_messages": CompanyMessages,
    "snips": partial(SnipsJson, data_dir="../shared/data/snips"),
    "e2e": partial(E2EJson, data_dir="../shared/data/e2e"),
}


def batches_of(way: str, options: argparse.Namespace) -> list[Batch]:
    """Training batches of one way over the same examples: ``options.batches`` of them, from short to long."""
    sizes = {"batch_size": options.batch, "train_size": options.examples, "validation_size": 1}
    task = DATA[options.data](pretrained=options.pretrained, batching=way, **sizes)
    task.setup("fit")
    made = sorted(task.train_dataloader(), key=lambda batch: batch["input_ids"].numel())
    step = len(made) / options.batches
    return [made[int((index + 0.5) * step)] for index in range(options.batches)]


def train(module: SFTModule, batches: Sequence[Batch]) -> None:
    """Forward and backward of every batch."""
    for batch in batches:
        for parameter in module.parameters():
            parameter.grad = None
        loss_of(module, batch).backward()


def loss_of(module: SFTModule, batch: Batch) -> torch.Tensor:
    """The loss as the training step computes it."""
    with module._training_arithmetic():
        return module.answer_loss(batch)


def padding(batches: Sequence[Batch]) -> float:
    """Share of the tokens computed that no example has."""
    return 1 - real_tokens(batches) / sum(batch["input_ids"].numel() for batch in batches)


def real_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of prompts and answers."""
    return sum(int(batch["prompt_mask"].sum()) + int((batch["labels"] >= 0).sum()) for batch in batches)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain types."""
    module = SFTModule(pretrained=options.pretrained)
    inject_adapters(module, LoRAConfig(rank=8))
    ways = {way: batches_of(way, options) for way in BATCHING}
    steps = {way: partial(train, module, batches) for way, batches in ways.items()}
    timings = harness.interleave({**steps, "twin": steps["as_drawn"]}, rounds=options.rounds, warmup=1)
    widest = max(ways["by_length"], key=lambda batch: int((batch["labels"] >= 0).sum()))
    return {
        "padding": {way: padding(batches) for way, batches in ways.items()},
        "to_as_drawn": {
            way: _of_a_token(timings.ratio(way, to="as_drawn"), batches, ways["as_drawn"])
            for way, batches in ways.items()
        },
        "self_test": timings.self_test("twin", twin="as_drawn").to_dict(),
        "saved_bytes": {chunk: _saved(module, widest, chunk) for chunk in (10**9, 512, 128, 32)},
        "answered_tokens": int((widest["labels"] >= 0).sum()),
    }


def _of_a_token(ratio: harness.Ratio, batches: Sequence[Batch], others: Sequence[Batch]) -> dict[str, float]:
    """The ratio of the times of one real token: the batches that are timed don't have the same number of them."""
    factor = real_tokens(others) / real_tokens(batches)
    return {name: value if name == "rounds" else value * factor for name, value in ratio.to_dict().items()}


def _saved(module: SFTModule, batch: Batch, chunk: int) -> int:
    module.logits_chunk = chunk
    _, saved = memory.alive_bytes(lambda: loss_of(module, batch))
    return saved


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the record. Returns 1 if the self-test failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description=__doc__)
    parser.add_argument("--data", default="company_messages", choices=list(DATA))
    parser.add_argument("--pretrained", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--examples", type=int, default=640, help="to make the batches of")
    parser.add_argument("--batches", type=int, default=3, help="that are timed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = record.environment()
    found = measure(options)
    if options.output:
        settings = {
            "data": options.data,
            "batch": options.batch,
            "examples": options.examples,
            "batches": options.batches,
            "clock": "cpu",
        }
        record.write(options.output, benchmark="batching", environment=environment, settings=settings, **found)
    table = Table(title=f"{options.data}, {options.batch} examples a batch, CPU time")
    for heading in ("batching", "padding", "time of a token / as drawn"):
        table.add_column(heading)
    for way, ratio in found["to_as_drawn"].items():
        table.add_row(way, f"{found['padding'][way]:.1%}", harness.spread(ratio))
    Console().print(table)
    for chunk, saved in found["saved_bytes"].items():
        print(f"logits of {min(chunk, found['answered_tokens'])} tokens at a time: {saved / 1e6:.1f} MB saved")
    return 0 if found["self_test"]["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
