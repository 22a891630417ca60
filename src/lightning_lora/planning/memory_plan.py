"""The result of :func:`~lightning_lora.planning.plan_memory`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_lora.planning.dry_run import GRADIENTS, StepMemory
from lightning_lora.planning.search import largest_that_fits
from lightning_lora.planning.units import GB, GIB, in_gb

if TYPE_CHECKING:
    from rich.console import Group

WEIGHTS = "base weights"
ADAPTERS = "adapters"
OPTIMIZER = "optimizer state"
WORKSPACE = "optimizer workspace"
CASTS = "weights cast for autocast"


@dataclass(frozen=True)
class BaseMemory:
    """Bytes of the base model's parameters and buffers.

    Attributes:
        parameters: Number of values, tied ones once; a quantized value counts as one.
        dense: Bytes of parameters and buffers that are stored as they are.
        codes: Bytes of the codes of quantized layers.
        constants: Bytes of what belongs to the codes.
        quantized: Names of the quantized layers.
        kept_dense: Linear layers that stay dense beside quantized ones: name -> reason.
    """

    parameters: int
    dense: int
    codes: int = 0
    constants: int = 0
    quantized: tuple[str, ...] = ()
    kept_dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All bytes of the base."""
        return self.dense + self.codes + self.constants


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training run on one device, in its steady state, part by part.

    What is counted is what tensors hold. A device needs more: the CUDA context (0.3 to 1 GB), what kernels take inside
    themselves, and gaps in the allocator's blocks.

    Attributes:
        base: The base model.
        trainable_parameters: Number of values that train.
        adapters: Bytes of the adapters' parameters.
        gradients: Bytes of all gradients.
        optimizer_state: Bytes that the optimizer keeps between steps.
        optimizer_workspace: Bytes that the optimizer's step takes for a moment.
        step: Forward and backward pass of one batch.
        kept_without_recomputation: Bytes that wait for the backward pass without gradient checkpointing; None if the
            module has no repeated blocks.
        kept_with_recomputation: The same with it.
        settings: What was planned, in words: batch, precision, optimizer, ...
    """

    base: BaseMemory
    trainable_parameters: int
    adapters: int
    gradients: int
    optimizer_state: int
    optimizer_workspace: int
    step: StepMemory
    kept_without_recomputation: int | None
    kept_with_recomputation: int | None
    settings: Mapping[str, str]
    replan: Callable[[str, int], MemoryPlan] = field(repr=False, compare=False)

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """Bytes by part at the three moments of a step that can be its peak.

        Lightning clears old gradients between forward and backward pass, so the forward pass has them, too.
        """
        fixed = self.between_steps
        return {
            "forward": {**fixed, **self.step.forward, GRADIENTS: self.gradients},
            "backward": {**fixed, **self.step.backward},
            "optimizer step": {**fixed, GRADIENTS: self.gradients, WORKSPACE: self.optimizer_workspace},
        }

    @property
    def between_steps(self) -> dict[str, int]:
        """Bytes by part that are there all the time, beside gradients and the batch."""
        fixed = {WEIGHTS: self.base.total, ADAPTERS: self.adapters, OPTIMIZER: self.optimizer_state}
        return {**fixed, CASTS: self.step.casts} if self.step.casts else fixed

    @property
    def moment(self) -> str:
        """Which of :attr:`moments` is the peak."""
        moments = self.moments
        return max(moments, key=lambda name: sum(moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak, part by part; they add up to :attr:`peak`."""
        return {part: size for part, size in self.moments[self.moment].items() if size}

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once."""
        return sum(self.parts.values())

    @property
    def peak_gb(self) -> float:
        """:attr:`peak` in GB, 10^9 bytes."""
        return self.peak / GB

    @property
    def peak_gib(self) -> float:
        """:attr:`peak` in GiB, 2^30 bytes, the unit of a card's name ("80 GB": 80 GiB) and of ``nvidia-smi``."""
        return self.peak / GIB

    def fits(self, gigabytes: float, *, reserve: float = 0.0) -> bool:
        """Whether the run fits a device.

        Args:
            gigabytes: Memory of the device in GB, 10^9 bytes.
            reserve: GB of it that are to stay free.
        """
        return self.peak <= (_positive(gigabytes) - reserve) * GB

    def largest(self, what: str, gigabytes: float, *, reserve: float = 0.0) -> int:
        """The largest batch, rank or length with which the run still fits a device, all else as planned.

        Each candidate is planned anew; the answer fits and the next larger does not (up to 2^20).

        Args:
            what: ``"batch"``, ``"rank"``, or ``"length"`` (of a ``TokenBatch``).
            gigabytes: Memory of the device in GB, 10^9 bytes.
            reserve: GB of it that are to stay free.

        Returns:
            The number; 0 if not even 1 fits.

        Raises:
            ValueError: If ``what`` is none of these, or has no meaning for this plan.
        """
        limit = (_positive(gigabytes) - reserve) * GB
        return largest_that_fits(lambda value: self.replan(what, value).peak, limit)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, strings and numbers; all sizes in bytes."""
        base = {**asdict(self.base), "quantized": list(self.base.quantized), "kept_dense": dict(self.base.kept_dense)}
        return {
            "settings": dict(self.settings),
            "base": {**base, "total": self.base.total},
            "trainable_parameters": self.trainable_parameters,
            "adapters": self.adapters,
            "gradients": self.gradients,
            "optimizer_state": self.optimizer_state,
            "optimizer_workspace": self.optimizer_workspace,
            "kept_for_backward": self.step.kept,
            "kept_without_recomputation": self.kept_without_recomputation,
            "kept_with_recomputation": self.kept_with_recomputation,
            "unknown_reads": self.step.unknown_reads,
            "moments": self.moments,
            "peak_moment": self.moment,
            "peak": self.peak,
            "peak_gb": round(self.peak_gb, 3),
            "peak_gib": round(self.peak_gib, 3),
        }

    @property
    def summary(self) -> str:
        """One line."""
        moment = self.moment if self.moment.endswith("step") else f"{self.moment} pass"
        return f"peak {in_gb(self.peak)} ({self.peak_gib:.2f} GiB) in the {moment}"

    def __rich__(self) -> Group:
        from lightning_lora.planning.table import plan_table

        return plan_table(self)


def _positive(gigabytes: float) -> float:
    number = isinstance(gigabytes, (int, float)) and not isinstance(gigabytes, bool)
    if not number or not 0 < gigabytes < math.inf:
        raise ValueError(f"gigabytes must be a positive number of GB (10^9 bytes), got {gigabytes!r}.")
    return gigabytes
