"""Layers that can carry adapters: the other half of the contract in :mod:`lightning_lora.adapter`.

An adapted layer is the user's own layer object with a mixin in front of its class. A host mixin says how to read and
write the layer's weight as a matrix ``(out_features, in_features)``; it never sees what kind of adapter it carries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapter import Adapter
from lightning_lora.class_swap import SwappedClass, original_class, restore_class, swap_class


class AdaptedLayer(SwappedClass):
    """Mixin of a frozen layer with named adapters; ``active`` says which of them act, in order."""

    class_prefix = "Adapted"
    weight: Tensor
    adapters: nn.ModuleDict
    active: tuple[str, ...]

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*args, **kwargs)
        # Subclasses call their input what they like (Conv1D: x), and callers may pass it by that name.
        input = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        for name in self.active:
            output = self.adapters[name](input, output)
        return output

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the weight as a matrix."""
        return cast("tuple[int, int]", tuple(self.weight_matrix().shape))

    def weight_matrix(self) -> Tensor:
        """The weight as ``(out_features, in_features)``: a view in the base's own dtype, never a copy."""
        return self.weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix ``(out_features, in_features)`` in the layout of the layer's own weight."""
        return matrix

    @torch.no_grad()
    def weight_update(self) -> Tensor:
        """What the active adapters add to the weight, ``(out_features, in_features)``, in at least fp32."""
        weight = self.weight_matrix()
        weight = weight.to(torch.promote_types(torch.float32, weight.dtype))
        update: Tensor | None = None
        for name in self.active:
            added = self.adapter(name).weight_update(weight if update is None else weight + update)
            update = added if update is None else update + added
        return torch.zeros_like(weight) if update is None else update

    @torch.no_grad()
    def merged_matrix(self) -> Tensor:
        """The weight with the active adapters folded in, ``(out_features, in_features)``, in at least fp32."""
        update = self.weight_update()
        return self.weight_matrix().to(update.dtype) + update

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``."""
        return cast(Adapter, self.adapters[name])


class AdaptedLinear(AdaptedLayer):
    """``nn.Linear`` and its subclasses: the weight is ``(out_features, in_features)``."""


class AdaptedConv1D(AdaptedLayer):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is ``(in_features, out_features)``."""

    @override
    def weight_matrix(self) -> Tensor:
        return self.weight.t()

    @override
    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()


def host_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The mixin for a layer of this type, or None if it cannot carry an adapter.

    transformers is not imported to recognise its class.
    """
    cls = original_class(module)
    if issubclass(cls, nn.Linear):
        return AdaptedLinear
    if any(base.__module__ == "transformers.pytorch_utils" and base.__name__ == "Conv1D" for base in cls.__mro__):
        return AdaptedConv1D
    return None


def attach_adapter(layer: nn.Module, name: str) -> AdaptedLayer:
    """Make a layer ready to hold the adapter ``name``: swap its class if needed. The caller stores the adapter."""
    if not isinstance(layer, AdaptedLayer):
        host = host_of(layer)
        assert host is not None, type(layer)
        swap_class(layer, host)
        layer = cast(AdaptedLayer, layer)
        layer.adapters = nn.ModuleDict()
        layer.active = ()
    layer.active = (name,)
    return layer


def detach_adapters(layer: AdaptedLayer) -> nn.ModuleDict:
    """Make an adapted layer exactly what it was, and return its adapters."""
    adapters = layer.adapters
    del layer.adapters
    del layer.active
    restore_class(layer)
    return adapters


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every adapted layer inside ``module`` with its dotted name; a shared layer comes once."""
    for name, child in module.named_modules():
        if isinstance(child, AdaptedLayer):
            yield name, child
