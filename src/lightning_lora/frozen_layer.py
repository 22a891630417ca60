"""A frozen linear layer: its weight is cast once, not in every pass, and its derivative taken as an adapted one's is.

Both concern layers without an adapter, too: where q and v alone have one, the others hold most of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.class_swap import SwappedClass, original_class
from lightning_lora.fused import CastCopy, frozen_linear, is_eager, is_emulated, product_dtype


class FrozenLayer(SwappedClass):
    """Mixin of a frozen layer; its outputs are those of its own class, to the last bit.

    Attributes:
        cast_copy: Keeps the weight in autocast's dtype, once autocast has acted.
    """

    class_prefix = "Frozen"
    weight: Tensor
    cast_copy: CastCopy | None = None

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weight: Tensor | None = self._parameters.get("weight")  # None where it is computed anew in each pass
        is_one = len(args) == 1 and not kwargs
        if is_one and weight is not None and _costs_more(weight) and self._hands_on_a_gradient(args[0]):
            dtype = product_dtype(args[0])
            if weight.dtype != dtype and torch.is_autocast_enabled(weight.device.type):
                weight = self.cast_of(weight, dtype)
            if weight.dtype == dtype:
                return frozen_linear(args[0], weight, cast("Tensor | None", self.bias))
        output: Tensor = super().forward(*args, **kwargs)
        return output

    def _hands_on_a_gradient(self, input: object) -> bool:
        """Whether this computes as ``nn.Linear`` does, and there is something below it that trains."""
        return (
            is_eager(input)
            and input.requires_grad
            and is_linear(original_class(self))
            and not any(own is not None and own.requires_grad for own in self._parameters.values())
        )

    def cast_of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of this layer in another dtype, from a copy where one may be kept."""
        if self.cast_copy is None:
            self.cast_copy = CastCopy()
        return self.cast_copy.of(weight, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.cast_copy is not None:
            self.cast_copy.drop()  # it would stay on the device that the module leaves
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _costs_more(weight: Tensor) -> bool:
    """Whether autocast would cast this weight, or the CPU takes its products value by value."""
    if weight.dtype == torch.float32:
        return torch.is_autocast_enabled(weight.device.type)
    return weight.is_cpu and is_emulated(weight.dtype)


def is_linear(cls: type[nn.Module]) -> bool:
    """Whether a class computes what ``nn.Linear`` does, by its very method."""
    return definer_of(cls) is nn.Linear


def definer_of(cls: type[nn.Module]) -> type:
    """The class that a class of modules has its forward from."""
    return next(parent for parent in cls.__mro__ if "forward" in vars(parent))


def drop_cast_copies(module: nn.Module) -> None:
    """Give the memory back that the last training step under autocast left for the next one."""
    for child in module.modules():
        if isinstance(child, FrozenLayer) and child.cast_copy is not None:
            child.cast_copy.drop()
