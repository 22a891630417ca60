"""The contract of an adapter: a small module beside a frozen layer.

A kind of adapter (LoRA, ...) implements two methods: what it does to a layer's output, and what it does to its weight.
It never sees what type of layer it is attached to; see :mod:`lightning_lora.layers` for the other half.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.fused import Frozen, Joint

ALL_ROWS = slice(None)


class Adapter(nn.Module, ABC):
    """A named adapter of one layer. Every parameter of it is an adapter parameter."""

    rank: int
    alpha: float
    scaling: float

    @abstractmethod
    def adapt(self, input: Tensor, base_output: Tensor) -> Tensor:
        """The layer's output with this adapter acting.

        Args:
            input: What the layer received, ``(..., in_features)``.
            base_output: What the layer, with the adapters before this one, returned, ``(..., out_features)``.
        """

    @abstractmethod
    def weight_update(self, weight: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        """What has to be added to the dense weight so that it gives, alone, the output of the layer with this adapter.

        Args:
            weight: ``(out_features, in_features)`` or fewer rows, in at least fp32; left as it is.
            rows: Which rows of the layer's weight ``weight`` holds.

        Returns:
            The update of these rows, in the shape and dtype of ``weight``.
        """

    def adapt_linear(
        self,
        input: Tensor,
        dtype: torch.dtype,
        frozen: Frozen,
        *,
        joint: Joint | None = None,
        partners: Iterable[Adapter] = (),
    ) -> tuple[Tensor, Joint | None] | None:
        """A linear layer and this adapter in one operation; None: the layer, and then :meth:`adapt`.

        Args:
            input: ``(..., in_features)``.
            dtype: Of the product.
            frozen: The layer's weight and bias.
            joint: What an earlier layer with the same input left.
            partners: Adapters of layers that may get the same input next, see :mod:`lightning_lora.fused.joint`.

        Returns:
            The output, and what is left for the next layer.
        """
        return None

    def forward(self, input: Tensor, base_output: Tensor) -> Tensor:
        """See :meth:`adapt`."""
        return self.adapt(input, base_output)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Adapters keep their precision whatever the base is cast to: bf16-true casts the whole module, after a resume
        # has restored it, and a bf16 adapter loses every optimizer step below 1/256 of its value.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(device=moved.device) if lowered else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A user may load base weights after the injection (in setup(), say): base files have no adapter keys.
        # Our own loading compares the adapter keys explicitly, so nothing is dropped unseen.
        absent: list[str] = []
        self._widen_for(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        if len(absent) < len(self._parameters):
            missing_keys.extend(absent)

    def _widen_for(self, state_dict: Any, prefix: str) -> None:
        # precision="64-true" widens the module only after a resume has restored it: what is in the file decides.
        for key, parameter in self._parameters.items():
            found = state_dict.get(prefix + key)
            if parameter is None or not isinstance(found, Tensor) or not found.is_floating_point():
                continue
            if found.dtype.itemsize > parameter.dtype.itemsize:
                parameter.data = parameter.data.to(found.dtype)
