"""What comes after the backward pass, over the adapters of a model: ``python -m benchmarks.optimizer``.

Clipping by norm, AdamW and zeroing, over every A and B of a shape: torch's default, its multi-tensor form, its fused
form as ``LoRACallback`` sets it, and one flat tensor as ``FlatOptimizer`` does. Gradients come from a backward pass
that does nothing else, timed beside, since gradients in one tensor are added where others are only handed over.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness, models, record
from lightning_lora.flat.optimizer import FlatGroups

Shapes = list[tuple[int, ...]]
_OTHERS = ("foreach", "fused", "flat")


@dataclass
class Variant:
    """Parameters with an optimizer, and the same gradients for them in every round."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    gradients: list[Tensor]
    gather: Callable[[], object] = lambda: None

    def backward(self) -> None:
        """Hand every parameter a gradient of its own."""
        _Give.apply(self.gradients, *self.parameters).backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """What Lightning calls between one backward pass and the next."""
        self.gather()
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Both."""
        self.backward()
        self.finish()


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient.clone() for gradient in ctx.gradients)


def adapter_shapes(shape: str, rank: int) -> Shapes:
    """Of every A and B of all linear layers of a shape."""
    with torch.device("meta"):
        model = models.SHAPES[shape].build()
    layers = [child for name, child in model.named_modules() if name.endswith(tuple(models.SHAPES[shape].linear))]
    return [size for layer in layers for size in ((rank, layer.in_features), (layer.out_features, rank))]


def build(shapes: Shapes, **options: Any) -> Variant:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) * 0.01 for shape in shapes]
    return Variant(parameters, torch.optim.AdamW(parameters, lr=1e-4, **options), gradients)


def build_flat(shapes: Shapes) -> Variant:
    variant = build(shapes, fused=True)
    groups = FlatGroups(variant.optimizer, why_not=_unexpected)
    variant.gather = groups.gather
    return variant


def _unexpected(parameter: nn.Parameter) -> None:
    raise RuntimeError("a parameter got no gradient")


def measure(shape: str, rank: int, rounds: int) -> dict[str, Any]:
    """One row: ratios to torch's default of what comes after the backward pass, and of both together."""
    shapes = adapter_shapes(shape, rank)
    variants = {
        "default": build(shapes),
        "default-twin": build(shapes),
        "foreach": build(shapes, foreach=True),
        "fused": build(shapes, fused=True),
        "flat": build_flat(shapes),
    }
    backwards = {name: variant.backward for name, variant in variants.items()}
    after = harness.interleave({name: v.finish for name, v in variants.items()}, rounds=rounds, before=backwards)
    both = harness.interleave({name: v.step for name, v in variants.items()}, rounds=rounds)
    _check(variants)
    return {
        "shape": shape,
        "rank": rank,
        "tensors": len(shapes),
        "self_test": after.self_test("default-twin", twin="default").to_dict(),
        "after_backward": {name: after.ratio(name, to="default").to_dict() for name in _OTHERS},
        "with_backward": {name: both.ratio(name, to="default").to_dict() for name in _OTHERS},
        "median_seconds": {name: [after.median(name), both.median(name)] for name in variants},
    }


def _check(variants: dict[str, Variant]) -> None:
    expected = variants["default"].parameters
    for name, variant in variants.items():
        if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(variant.parameters, expected, strict=True)):
            raise RuntimeError(f"{name} and torch's default came to different values")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every rank, print the table, write the record. Returns 1 if a row failed its self-test."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", choices=list(models.SHAPES))
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/optimizer.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = record.environment()
    rows = [measure(options.shape, rank, options.rounds) for rank in options.rank]
    view = Table(title=f"clip, AdamW and zeroing over the adapters of {options.shape}, to torch's default, cpu time")
    for heading in ("rank", "tensors", "self-test", "", "foreach", "fused (LoRACallback)", "flat (FlatOptimizer)"):
        view.add_column(heading)
    for row in rows:
        start = (str(row["rank"]), str(row["tensors"]), f"{row['self_test']['median']:.3f}")
        view.add_row(*start, "after backward", *(harness.spread(row["after_backward"][name]) for name in _OTHERS))
        view.add_row("", "", "", "with backward", *(harness.spread(row["with_backward"][name]) for name in _OTHERS))
    Console(width=150).print(view)
    if options.output:
        settings = {"clock": "cpu", "rounds": options.rounds}
        record.write(options.output, benchmark="optimizer", environment=environment, settings=settings, rows=rows)
    return 0 if all(row["self_test"]["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
