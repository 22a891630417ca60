"""What an optimizer keeps for each parameter, and what it takes for a moment in its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

_STEP = 4  # the step counter of torch's optimizers: one fp32 number a tensor


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer.

    Attributes:
        name: For reports.
        state: Bytes that it keeps for one parameter.
        workspace: Bytes that its step takes for a moment, of all parameters together.
    """

    name: str
    state: Callable[[Tensor], int]
    workspace: Callable[[Iterable[Tensor]], int]


class OptimizerKind(Protocol):
    """What names an optimizer in its ``kind``: an :class:`~lightning_lora.OptimizerConfig`."""

    @property
    def kind(self) -> str:
        """One of :data:`OPTIMIZERS`."""


def _adamw(parameter: Tensor) -> int:
    """Two moments in the parameter's own dtype: fp32 for adapters, bf16 for a bf16 module that is trained in full."""
    return 2 * parameter.nbytes + _STEP


def _adamw_8bit(parameter: Tensor) -> int:
    """AdamW8bit of bitsandbytes (0.45 to 0.50).

    One byte a value of each moment, an fp32 constant for each block of 256, and (not counted) two tables of 256 values
    that all tensors share; tensors below 4096 values keep fp32 moments.
    """
    count = parameter.numel()
    return 2 * 4 * count if count < 4096 else 2 * (count + 4 * math.ceil(count / 256))


def _adamw_32bit(parameter: Tensor) -> int:
    """AdamW of bitsandbytes: two fp32 moments, whatever the parameter's dtype, and a step counter that is no tensor."""
    return 2 * 4 * parameter.numel()


def _one_copy(parameters: Iterable[Tensor]) -> int:
    """The multi-tensor path, torch's default on a GPU, takes the square roots of all second moments at once."""
    return sum(parameter.nbytes for parameter in parameters)


def _nothing(parameters: Iterable[Tensor]) -> int:
    return 0


# Paged states count as in the class without pages: how much of them CUDA moves to the CPU is known only in the run.
OPTIMIZERS = {
    "adamw": OptimizerMemory("AdamW", _adamw, _one_copy),
    "adamw_fused": OptimizerMemory("AdamW (fused)", _adamw, _nothing),
    "adamw8bit": OptimizerMemory("AdamW (8-bit)", _adamw_8bit, _nothing),
    "paged_adamw8bit": OptimizerMemory("AdamW (8-bit, paged)", _adamw_8bit, _nothing),
    "paged_adamw": OptimizerMemory("AdamW (paged)", _adamw_32bit, _nothing),
    "sgd": OptimizerMemory("SGD", lambda parameter: 0, _nothing),
    "sgd_momentum": OptimizerMemory("SGD with momentum", lambda parameter: parameter.nbytes, _nothing),
}


_CLASSES = {
    "Adam": "adamw",
    "AdamW": "adamw",
    "AdamW8bit": "adamw8bit",
    "PagedAdamW8bit": "paged_adamw8bit",
    "PagedAdamW": "paged_adamw",
}


def as_optimizer(value: str | OptimizerKind | OptimizerMemory | Optimizer) -> OptimizerMemory:
    """An optimizer by its name, that of a config, one that the caller describes, or a real one.

    Raises:
        ValueError: If the name, or what a real one keeps, is not known.
    """
    if isinstance(value, OptimizerMemory):
        return value
    if isinstance(value, Optimizer):
        return OPTIMIZERS[_name_of(value)]
    name = value if isinstance(value, str) else getattr(value, "kind", None)
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}, an OptimizerConfig, or an OptimizerMemory that says "
            f"what it keeps; got {value!r}."
        )
    return OPTIMIZERS[name]


def _name_of(optimizer: Optimizer) -> str:
    kind, group = type(optimizer).__name__, optimizer.param_groups[0]
    if kind == "SGD":
        return "sgd_momentum" if group["momentum"] else "sgd"
    if kind not in _CLASSES or group.get("amsgrad"):
        raise ValueError(f"what {kind} keeps is not known. Pass an OptimizerMemory that says it.")
    # torch updates one tensor after the other on a CPU, unless told otherwise.
    one_by_one = not group.get("foreach") and group["params"][0].device.type == "cpu"
    return "adamw_fused" if _CLASSES[kind] == "adamw" and (group.get("fused") or one_by_one) else _CLASSES[kind]
