"""What Lightning's ``precision`` does to a module and around its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Attributes say what the plugin of Lightning does.

    Attributes:
        cast: Dtype that the whole module and the inputs are cast to; adapters keep theirs.
        autocast: Dtype of autocast during the forward pass.
    """

    cast: torch.dtype | None = None
    autocast: torch.dtype | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The context of the forward pass."""
        default = torch.get_default_dtype()
        try:
            if self.cast is not None:
                torch.set_default_dtype(self.cast)  # as Lightning's HalfPrecision does
            with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            torch.set_default_dtype(default)


PRECISIONS = {
    "32-true": Precision(),  # Lightning leaves the module's dtypes as they are
    "bf16-true": Precision(cast=torch.bfloat16),
    "16-true": Precision(cast=torch.float16),
    "64-true": Precision(cast=torch.float64),
    "bf16-mixed": Precision(autocast=torch.bfloat16),
    "16-mixed": Precision(autocast=torch.float16),
}


def as_precision(name: str) -> Precision:
    """Precision by Lightning's name.

    Raises:
        ValueError: If the name is none of Lightning's that this knows.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {name!r}.")
    return PRECISIONS[name]
