"""What gradient checkpointing does to which block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

RECOMPUTED = "recomputed"
OFFLOADED = "recomputed, inputs in CPU memory"
KEPT = "keeps its activations (every_n)"
LEFT = "left to the CheckpointWrapper around or inside it"


@dataclass(frozen=True)
class BlockRow:
    """One block.

    Attributes:
        name: Dotted name; empty for the module itself.
        type: Its class.
        how: What happens to it, in words.
    """

    name: str
    type: str
    how: str


@dataclass(frozen=True)
class GradientCheckpointingReport:
    """What :func:`~lightning_lora.gradient_checkpointing.enable_gradient_checkpointing` did.

    Attributes:
        blocks: All blocks in module order, with what happens to each.
        notes: Facts worth knowing, such as switches of the model's own that are off meanwhile.
    """

    blocks: tuple[BlockRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the blocks that are recomputed."""
        return tuple(row.name for row in self.blocks if row.how in (RECOMPUTED, OFFLOADED))

    @property
    def summary(self) -> str:
        """One line with the counts."""
        return f"{len(self.recomputed)} of {len(self.blocks)} blocks are recomputed in the backward pass"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {"blocks": [asdict(row) for row in self.blocks], "notes": list(self.notes)}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table(title="gradient checkpointing", title_justify="left")
        for header in ("block", "type", "activations"):
            table.add_column(header, overflow="fold")
        for row in self.blocks:
            table.add_row(row.name or "(the module itself)", row.type, row.how)
        return Group(table, *(f"  note: {note}" for note in self.notes), self.summary)
