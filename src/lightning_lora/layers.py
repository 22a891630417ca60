"""Layers that can carry adapters: the other half of the contract in :mod:`lightning_lora.adapter`.

An adapted layer is the user's own layer object with a mixin in front of its class. A host mixin says how to read and
write the layer's weight as a matrix ``(out_features, in_features)``; it never sees what kind of adapter it carries.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapter import ALL_ROWS, Adapter
from lightning_lora.class_swap import original_class, restore_class, swap_class
from lightning_lora.frozen_layer import FrozenLayer, definer_of, leave_frozen
from lightning_lora.fused import Frozen, may_fuse, product_dtype, siblings
from lightning_lora.quantized_layer import QuantizedLayer

_MOST_FOLLOWERS = 3


class AdaptedLayer(FrozenLayer):
    """Mixin of a frozen layer with named adapters.

    Attributes:
        adapters: By name.
        active: Names of those that act, in order.
        followers: Later layers of the same parent that may get the same input, see :func:`note_siblings`.
    """

    class_prefix = "Adapted"
    adapters: nn.ModuleDict
    active: tuple[str, ...]
    followers: tuple[nn.Module, ...] = ()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(self.active) == 1 and len(args) + len(kwargs) == 1:
            only = args[0] if args else next(iter(kwargs.values()))
            fused = self._in_one(only, self.adapter(self.active[0]))
            if fused is not None:
                return fused
        output: Tensor = super().forward(*args, **kwargs)
        # Subclasses call their input what they like (Conv1D: x), and callers may pass it by that name.
        input = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        for name in self.active:
            output = self.adapters[name](input, output)
        return output

    def _in_one(self, input: Tensor, adapter: Adapter) -> Tensor | None:
        if not may_fuse(input, adapter):
            return None
        dtype = product_dtype(input)
        frozen = self.frozen_part(dtype, is_cast=torch.is_autocast_enabled(input.device.type))
        if frozen is None:
            return None
        joint = siblings.take_joint(input, dtype)
        found = adapter.adapt_linear(input, dtype, frozen, joint=joint, partners=self._partners(input))
        if found is None:
            return None
        output, left = found
        if left is not None:
            siblings.leave_joint(input, left)
        return output

    def _partners(self, input: Tensor) -> Iterator[Adapter]:
        """Adapters of the layers that may get the same input next."""
        if not input.is_inference():  # which has no version: a change would not be seen
            for layer in self.followers:
                if isinstance(layer, AdaptedLayer) and len(layer.active) == 1:
                    yield layer.adapter(layer.active[0])

    def frozen_part(self, dtype: torch.dtype, *, is_cast: bool) -> Frozen | None:
        """Weight and bias, if a product with them in ``dtype`` is all that the layer computes without adapters.

        Args:
            dtype: Of the product.
            is_cast: Whether the weight may be cast to it, as autocast does; else the layer refuses another dtype.
        """
        weight, bias = self.weight, cast("Tensor | None", self.bias)
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains or _computes_its_own(cast(Hashable, original_class(self))):
            return None
        if weight.dtype != dtype:
            if not is_cast:
                return None
            weight = self.cast_of(weight, dtype)
        return Frozen(self.as_matrix(weight), bias)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the weight as a matrix."""
        return cast("tuple[int, int]", tuple(self.weight_matrix().shape))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the dense weight: the one that :meth:`weight_matrix` has, and a merged weight gets."""
        return self.weight.dtype

    @property
    def computed_in(self) -> torch.dtype:
        """Dtype that a product with the weight is rounded to at the most, outside of autocast."""
        return self.weight_dtype

    def weight_matrix(self) -> Tensor:
        """The weight as ``(out_features, in_features)``: a view in the base's own dtype, never a copy."""
        return self.as_matrix(self.weight)

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A weight in the layer's own layout as a matrix ``(out_features, in_features)``."""
        return weight

    @staticmethod
    def as_weight(matrix: Tensor) -> Tensor:
        """A matrix ``(out_features, in_features)`` in the layout of the layer's own weight."""
        return matrix

    def weight_update(self) -> Tensor:
        """What the active adapters add to the weight, ``(out_features, in_features)``, in at least fp32."""
        return update_of(self.active_adapters, self._exact_weight())

    @torch.no_grad()
    def merged_matrix(self) -> Tensor:
        """The weight with the active adapters folded in, ``(out_features, in_features)``, in at least fp32."""
        weight = self._exact_weight()
        return weight + update_of(self.active_adapters, weight)

    def _exact_weight(self) -> Tensor:
        weight = self.weight_matrix()
        return weight.to(torch.promote_types(torch.float32, weight.dtype))

    @property
    def active_adapters(self) -> list[Adapter]:
        """The adapters that act, in order."""
        return [self.adapter(name) for name in self.active]

    @property
    def has_own_forward(self) -> bool:
        """Whether the layer's class computes something of its own, which need not be linear in the weight."""
        return _computes_its_own(cast(Hashable, original_class(self)))

    def probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs for a small random input: with live adapters, with a merged weight, and of the base alone.

        A copy of the layer computes them, in eval mode and at least fp32 so that no rounding hides a difference; the
        layer, its hooks and the random stream see nothing of it.
        """
        twin = copy.copy(self)
        for key, value in vars(self).items():
            if "hook" in key and isinstance(value, dict):
                vars(twin)[key] = OrderedDict()  # a hook may hold the whole model
        twin.followers = ()
        twin = copy.deepcopy(twin).to(torch.promote_types(torch.float32, self.weight.dtype)).eval()
        drawn = torch.randn(4, self.matrix_shape[1], generator=torch.Generator().manual_seed(0))
        merged, active = twin.as_weight(twin.merged_matrix()), twin.active
        outputs = []
        for names, weight in ((active, twin.weight.data), ((), merged), ((), twin.weight.data)):
            twin.active, twin.weight.data = names, weight
            with torch.no_grad(), torch.random.fork_rng([self.weight.device] if self.weight.is_cuda else []):
                outputs.append(twin.forward(drawn.to(twin.weight)))
        adapted, merged, base = outputs
        return adapted, merged, base

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``."""
        return cast(Adapter, self.adapters[name])


class AdaptedLinear(AdaptedLayer):
    """``nn.Linear`` and its subclasses: the weight is ``(out_features, in_features)``."""


class AdaptedConv1D(AdaptedLayer):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is ``(in_features, out_features)``."""

    @staticmethod
    @override
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    @staticmethod
    @override
    def as_weight(matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()


class AdaptedQuantized(AdaptedLayer):
    """A layer in 4, 8 or 16 bits: its weight is what the codes stand for."""

    @property
    @override
    def matrix_shape(self) -> tuple[int, int]:
        return self._layer.out_features, self._layer.in_features

    @override
    def frozen_part(self, dtype: torch.dtype, *, is_cast: bool) -> Frozen | None:
        layer, bias = self._layer, cast("Tensor | None", self.bias)
        if layer.compute_dtype not in (None, dtype) or (bias is not None and bias.requires_grad):
            return None
        return Frozen(layer.dequantize, bias)

    @property
    @override
    def weight_dtype(self) -> torch.dtype:
        return self._layer.dense_dtype

    @property
    @override
    def computed_in(self) -> torch.dtype:
        return self._layer.compute_dtype or self._layer.dense_dtype

    @override
    def weight_matrix(self) -> Tensor:
        """The weight as ``(out_features, in_features)``, dequantized into a new tensor, in at least fp32."""
        return self._layer.dense_weight()

    @property
    def _layer(self) -> QuantizedLayer:
        return cast(QuantizedLayer, self)


@functools.cache
def _computes_its_own(original: Hashable) -> bool:
    """Whether a class computes something else than a linear layer does."""
    definer = definer_of(cast("type[nn.Module]", original))
    return definer is not nn.Linear and not _is_conv1d(definer) and not issubclass(definer, QuantizedLayer)


@torch.no_grad()
def update_of(adapters: Sequence[Adapter], weight: Tensor, rows: slice = ALL_ROWS) -> Tensor:
    """What adapters add, in order, to a weight ``(out_features, in_features)`` in at least fp32, or to rows of it."""
    update: Tensor | None = None
    for adapter in adapters:
        added = adapter.weight_update(weight if update is None else weight + update, rows)
        update = added if update is None else update + added
    return torch.zeros_like(weight) if update is None else update


def host_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The mixin for a layer of this type, or None if it cannot carry an adapter.

    transformers is not imported to recognise its class.
    """
    cls = original_class(module)
    if issubclass(cls, QuantizedLayer):
        return AdaptedQuantized
    if issubclass(cls, nn.Linear):
        return AdaptedLinear
    return AdaptedConv1D if any(map(_is_conv1d, cls.__mro__)) else None


def _is_conv1d(cls: type) -> bool:
    return cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"


def attach_adapter(layer: nn.Module, name: str) -> AdaptedLayer:
    """Make a layer ready to hold the adapter ``name``: swap its class if needed. The caller stores the adapter.

    A new adapter becomes the active one; for one that is there already, what is active stays the user's choice.
    """
    if not isinstance(layer, AdaptedLayer):
        host = host_of(layer)
        assert host is not None, type(layer)
        leave_frozen(layer)
        swap_class(layer, host)
        layer = cast(AdaptedLayer, layer)
        layer.adapters = nn.ModuleDict()
        layer.active = ()
    if name not in layer.adapters:
        layer.active = (name,)
    return layer


def detach_adapters(layer: AdaptedLayer) -> nn.ModuleDict:
    """Make an adapted layer exactly what it was, and return its adapters."""
    adapters = layer.adapters
    del layer.adapters
    del layer.active
    layer.__dict__.pop("cast_copy", None)
    layer.__dict__.pop("followers", None)
    restore_class(layer)
    return adapters


def reattach_adapters(layer: nn.Module, adapters: nn.ModuleDict, active: tuple[str, ...]) -> None:
    """Undo :func:`detach_adapters`."""
    adapted = attach_adapter(layer, next(iter(adapters)))
    adapted.adapters, adapted.active = adapters, active


def note_siblings(module: nn.Module) -> None:
    """Note on every adapted layer those of the same width that come after it in its parent, as k and v after q.

    Which of them get its input is known when they are called. Until then it multiplies by the A of three of them, if
    there are as many: a guess that costs little where it is wrong, as it mostly would be in a list or a sequence.
    """
    for parent in module.modules():
        later: dict[int, tuple[nn.Module, ...]] = {}
        for child in reversed(list(parent.children())):
            if isinstance(child, AdaptedLayer):
                width = child.matrix_shape[1]
                guessed = () if isinstance(parent, nn.Sequential | nn.ModuleList) else later.get(width, ())
                child.followers = guessed[:_MOST_FOLLOWERS]
                later[width] = (child, *guessed)


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every adapted layer inside ``module`` with its dotted name; a shared layer comes once."""
    for name, child in module.named_modules():
        if isinstance(child, AdaptedLayer):
            yield name, child
