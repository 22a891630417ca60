"""A frozen linear layer: its weight is cast once, not in every pass, and its derivative taken as an adapted one's is.

Both concern layers without an adapter, too: where q and v alone have one, the others hold most of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.class_swap import SwappedClass, original_class, restore_class, swapped_parents
from lightning_lora.fused import CastCopy, frozen_linear, is_dry_run, is_eager, is_emulated, product_dtype
from lightning_lora.fused.products import PLAIN_TENSORS


class FrozenLayer(SwappedClass):
    """Mixin of a frozen layer; its outputs are those of its own class, to the last bit.

    Attributes:
        keeps_cast: Whether the weight in autocast's dtype may be kept from step to step.
        cast_copy: Keeps it, once autocast has acted.
    """

    class_prefix = "Frozen"
    weight: Tensor
    keeps_cast: bool = True
    cast_copy: CastCopy | None = None

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and is_eager(args[0]) and self._hands_on_a_gradient(args[0]):
            input, weight = args[0], self.weight
            if weight.dtype == torch.float32:  # which costs more only where autocast casts it
                dtype = product_dtype(input)
                weight = self.cast_of(weight, dtype) if self.keeps_cast else weight.to(dtype)
            return frozen_linear(input, weight, cast("Tensor | None", self.bias))
        output: Tensor = super().forward(*args, **kwargs)
        return output

    def _hands_on_a_gradient(self, input: Tensor) -> bool:
        """Whether something below this layer trains and it does not, and it costs more than it has to."""
        weight = self._parameters.get("weight")  # None where it is computed anew in each pass
        if weight is None or not input.requires_grad or weight.requires_grad:
            return False
        if not _is_cast(weight, input) and not (input.is_cpu and is_emulated(weight.dtype)):
            return False
        bias = cast("Tensor | None", self.bias)
        is_plain = type(weight) in PLAIN_TENSORS or is_dry_run()  # other tensors have products of their own
        return is_plain and is_linear(original_class(self)) and not (bias is not None and bias.requires_grad)

    def cast_of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of this layer in another dtype, from a copy where one may be kept."""
        if self.cast_copy is None:
            self.cast_copy = CastCopy()
        return self.cast_copy.of(weight, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.cast_copy is not None:
            self.cast_copy.drop()  # it would stay on the device that the module leaves
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _is_cast(weight: Tensor, input: Tensor) -> bool:
    """Whether autocast casts this weight for a product with this input; fp64 it leaves alone."""
    kind = input.device.type
    if weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return False
    return product_dtype(input) == torch.get_autocast_dtype(kind)


def leave_frozen(layer: nn.Module) -> None:
    """Give a frozen layer without adapters its own class back; any other one stays as it is."""
    if isinstance(layer, FrozenLayer) and swapped_parents(type(layer))[0] is FrozenLayer:
        for key in ("cast_copy", "keeps_cast"):
            layer.__dict__.pop(key, None)
        restore_class(layer)


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
