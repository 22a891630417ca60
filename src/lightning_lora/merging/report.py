"""What a merge did, in numbers that can be checked: per layer, over all layers, and for the outputs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_lora.merging.block_sum import Folded

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one layer.

    Attributes:
        name: Dotted name.
        update: Frobenius norm of the update ``scaling * B A``.
        weight: Frobenius norm of the base weight.
        error: ``|merged - base - update| / |update|``: what rounding to the weight's dtype, or to codes, costs.
        shift: ``|base - live base| / |update|``: how far the weight that the update was added to is from the one that
            the adapters were trained on. 0 unless the merge was into the original weights.
    """

    name: str
    update: float
    weight: float
    error: float
    shift: float = 0.0


@dataclass(frozen=True)
class OutputDifference:
    """Outputs of the merged module against those with live adapters, on one batch.

    Both are the live module's, in its own dtype: of an artifact in another ``MergeConfig.dtype`` they say nothing.

    Attributes:
        max_abs: Largest absolute difference of any element.
        relative: Norm of the difference over the norm of what the adapters change in the output.
    """

    max_abs: float
    relative: float


@dataclass(frozen=True)
class MergeReport:
    """Proof of a merge.

    Attributes:
        layers: One entry per merged layer.
        relative_error: Error over all layers, in units of the update.
        source: ``"last"`` or ``"best"``.
        base: What the update was added to, see :class:`~lightning_lora.MergeConfig`; of a dense base the base itself.
        dtype: Dtype of the merged weights: of the artifact, where one was written.
        output_difference: Of the live module, see :class:`OutputDifference`. None where no batch had been seen, where
            the live module's dtype can't hold the merge, or where the module gives other outputs at every call.
        folder: Where the artifact is, if one was written.
    """

    layers: tuple[MergedLayer, ...]
    relative_error: float
    source: str = "last"
    base: str = "dequantized"
    dtype: str = "float32"
    output_difference: OutputDifference | None = None
    folder: str | None = None

    @property
    def max_relative_error(self) -> float:
        """The largest error of a layer, in units of its update."""
        return max((layer.error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {
            **dataclasses.asdict(self),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "max_relative_error": self.max_relative_error,
        }

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        into = "" if self.base == "dequantized" else f", {self.base} base"
        table = Table(title=f"merged {self.source} adapters ({self.dtype}{into})", title_justify="left")
        table.add_column("layer", overflow="fold")
        shifted = any(layer.shift for layer in self.layers)
        for header in ("|update|", "|update|/|weight|", "error/|update|", *["base moved by/|update|"] * shifted):
            table.add_column(header, justify="right", no_wrap=True)
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:8]
        for layer in worst:
            share = layer.update / layer.weight if layer.weight else math.inf
            moved = [f"{layer.shift:.1e}"] * shifted
            table.add_row(layer.name, f"{layer.update:.3g}", f"{share:.2%}", f"{layer.error:.1e}", *moved)
        lines = [
            f"{len(self.layers)} layers, worst first; error over all layers {self.relative_error:.1e} of the update"
        ]
        if self.output_difference is not None:
            difference = self.output_difference
            lines.append(
                "outputs of the live module, in its own dtype, on a batch: "
                f"largest difference {difference.max_abs:.1e}, {difference.relative:.1e} of what the adapters change"
            )
        if self.folder is not None:
            lines.append(f"written to {self.folder}")
        return Group(table, *lines)


@dataclass
class Norms:
    """Sums of squares over layers, in units that add up."""

    error: float = 0.0
    update: float = 0.0
    layers: list[MergedLayer] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)

    def add(self, name: str, folded: Folded, *, shift: float = 0.0) -> None:
        """Count a layer in; ``shift`` is the norm of the weight that it was folded into less the live one."""
        size = folded.update
        self.dtypes.add(str(folded.stored.dtype).removeprefix("torch."))
        self.error += folded.error**2
        self.update += size**2
        error, moved = (value / size if size else 0.0 for value in (folded.error, shift))
        self.layers.append(MergedLayer(name, size, folded.weight, error, moved))

    @property
    def relative_error(self) -> float:
        """Error over all layers, in units of the update."""
        return math.sqrt(self.error / self.update) if self.update else 0.0
