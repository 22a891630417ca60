"""A memory plan for a reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_lora.planning.units import in_gb

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from lightning_lora.planning.memory_plan import MemoryPlan


def plan_table(plan: MemoryPlan) -> Group:
    """Parts of the peak, then what recomputation changes, what stays dense, and the sum."""
    from rich.console import Group
    from rich.table import Table

    title = ", ".join(f"{key} {value}" for key, value in plan.settings.items() if value)
    table = Table(title=f"memory at the peak: {title}", title_justify="left")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for part, size in plan.parts.items():
        table.add_row(part, in_gb(size), f"{size / plan.peak:.1%}")
    lines: list[RenderableType] = [table]
    lines += [f"  {line}" for line in _notes(plan)]
    lines.append(plan.summary)
    return Group(*lines)


def _notes(plan: MemoryPlan) -> list[str]:
    base = plan.base
    notes = [f"base: {base.parameters:,} parameters; {plan.trainable_parameters:,} values train"]
    if base.quantized:
        notes.append(
            f"{len(base.quantized)} layers quantized: codes {in_gb(base.codes)}, constants {in_gb(base.constants)}; "
            f"what stays dense {in_gb(base.dense)}"
        )
    notes += [f"  dense: {name}: {reason}" for name, reason in base.kept_dense.items()]
    if plan.kept_without_recomputation is not None and plan.kept_with_recomputation is not None:
        notes.append(
            f"kept for the backward pass: {in_gb(plan.kept_without_recomputation)} without gradient checkpointing, "
            f"{in_gb(plan.kept_with_recomputation)} with it"
        )
    if plan.step.unknown_reads:
        notes.append(
            "the step looks at floating-point values (loss.item()): each was NaN here, also where it decides something"
        )
    return notes
