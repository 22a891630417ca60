"""What an injection did, layer by layer: printed as a table, logged, and read by programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


@dataclass(frozen=True)
class LayerRow:
    """One adapted layer.

    Attributes:
        name: Dotted name in the module.
        type: Class of the layer before the injection.
        shape: ``(out_features, in_features)``.
        rank: Rank of its adapter.
        alpha: Alpha of its adapter.
        scaling: Factor of its update.
        trainable: Number of adapter parameters.
        total: Number of parameters of the layer with its adapter.
    """

    name: str
    type: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scaling: float
    trainable: int
    total: int


@dataclass(frozen=True)
class InjectionReport:
    """What :func:`~lightning_lora.inject_adapters` did.

    Attributes:
        adapter: Name of the adapter.
        kind: Kind of the adapter, such as ``"lora"``.
        layers: The adapted layers in module order.
        saved: Parameters trained in full beside the adapters: name -> number of elements.
        skipped: Layers that could have been meant and stay frozen: name -> reason.
        notes: Facts worth knowing, such as norm layers whose statistics are kept.
        trainable_parameters: Elements that train: adapters and saved modules.
        total_parameters: Elements of the whole module with its adapters.
    """

    adapter: str
    kind: str
    layers: tuple[LayerRow, ...]
    trainable_parameters: int
    total_parameters: int
    saved: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def trainable_share(self) -> float:
        """Trainable over total parameters, in [0, 1]."""
        return self.trainable_parameters / max(1, self.total_parameters)

    @property
    def summary(self) -> str:
        """One line with the counts."""
        return (
            f"{len(self.layers)} layers adapted: {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"parameters train ({self.trainable_share:.3%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        values = asdict(self)
        values["layers"] = [{**asdict(row), "shape": list(row.shape)} for row in self.layers]
        values["saved"], values["skipped"] = dict(self.saved), dict(self.skipped)
        values["notes"] = list(self.notes)
        return values

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"adapter {self.adapter!r} ({self.kind})", title_justify="left")
        table.add_column("layer", overflow="fold")
        for header in ("layers", "shape", "rank", "alpha", "trainable", "total"):
            table.add_column(header, justify="right", no_wrap=True)
        for group in _groups(self.layers):
            row = group[0]
            table.add_row(
                row.name if len(group) == 1 else _without_indices(row.name),
                str(len(group)),
                f"{row.shape[0]} x {row.shape[1]}",
                str(row.rank),
                f"{row.alpha:g}",
                f"{sum(r.trainable for r in group):,}",
                f"{sum(r.total for r in group):,}",
            )
        parts: list[RenderableType] = [table]
        parts += [f"  trained in full: {name} ({count:,})" for name, count in self.saved.items()]
        parts += [f"  not adapted: {line}" for line in _skipped_lines(self.skipped)]
        parts += [f"  note: {note}" for note in self.notes]
        parts.append(self.summary)
        return Group(*parts)


def _without_indices(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _groups(rows: tuple[LayerRow, ...]) -> list[list[LayerRow]]:
    """Rows that differ only in block indices, together: a 30-block model prints as seven lines."""
    groups: dict[tuple[object, ...], list[LayerRow]] = {}
    for row in rows:
        key = (_without_indices(row.name), row.type, row.shape, row.rank, row.alpha, row.scaling)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    by_reason: dict[tuple[str, str], int] = {}
    for name, reason in skipped.items():
        key = (_without_indices(name), reason)
        by_reason[key] = by_reason.get(key, 0) + 1
    return [
        f"{name}{f' ({count} layers)' if count > 1 else ''}: {reason}" for (name, reason), count in by_reason.items()
    ]
