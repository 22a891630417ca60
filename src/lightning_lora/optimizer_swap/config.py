"""Which AdamW the adapters are trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("adamw8bit", "paged_adamw8bit", "paged_adamw", "adamw")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Train with another AdamW than the one that ``configure_optimizers`` returns, with its hyper-parameters.

    The optimizer stays the same object, with its groups, schedulers and hooks; only its class and the form of its
    state change. Names that other code makes of the class change with it: ``LearningRateMonitor`` logs
    ``lr-AdamW8bit``.

    Attributes:
        kind: ``"adamw8bit"``: both moments in 8 bits, with one fp32 scale for 256 values (arXiv:2110.02861, section
            2), 2.03 bytes a parameter instead of 8. Tensors of fewer than 4096 elements keep fp32 moments: an adapter
            of rank 8 on 256 features has 2048.
            ``"paged_adamw8bit"``: the same, in memory that CUDA moves to the CPU when the GPU's runs short
            (arXiv:2305.14314, section 3); tensors of fewer than 100,000 elements stay on the GPU.
            ``"paged_adamw"``: fp32 moments in such memory.
            ``"adamw"``: torch's own, also where the user's code made an Adam.
            The first three are bitsandbytes'.

    Raises:
        ValueError: For a ``kind`` that there is not.
    """

    kind: str = "adamw8bit"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of optimizer must be one of {', '.join(KINDS)}; got {self.kind!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain dicts, lists, strings and numbers."""
        return {"kind": self.kind}


def as_optimizer_config(value: Any) -> OptimizerConfig | None:
    """None: None; a string: that kind; also what Hydra makes of a nested node without ``_target_``."""
    if isinstance(value, str):
        return OptimizerConfig(kind=value)
    if isinstance(value, Mapping):
        return OptimizerConfig(**{str(key): item for key, item in value.items() if key != "_target_"})
    if value is not None and not isinstance(value, OptimizerConfig):
        raise ValueError(f"optimizer must be None, one of {', '.join(KINDS)}, or an OptimizerConfig; got {value!r}.")
    return value
