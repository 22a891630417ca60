"""What the rest of the package knows of a frozen linear layer whose weight is stored in 4, 8 or 16 bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import QuantizationError


class QuantizedLayer(nn.Module):
    """A linear layer with codes in the place of its weight; :mod:`lightning_lora.quantization` makes them.

    Attributes:
        in_features: Columns of the dense weight.
        out_features: Rows of the dense weight.
        compute_dtype: Dtype of the product; None: autocast's under autocast, else the input's.
        dense_dtype: Dtype of the dense weight: of the one that was quantized, until the module is cast.
        stored_as: The ``QuantizationConfig`` of a layer that this package quantized; None: it was found so.
        quantized_from: Dtype of the weight that this package quantized.
        was_trainable: Whether that weight required gradients, as it does again once it is dense and thawed.
        parameter_class: Type of the parameter that holds the codes.
        holds: Dtype of codes that are the values themselves; None: they stand for them.
    """

    in_features: int
    out_features: int
    weight: Any
    compute_dtype: torch.dtype | None
    dense_dtype: torch.dtype
    stored_as: Any = None
    quantized_from: torch.dtype | None = None
    was_trainable: bool = False
    parameter_class: type[nn.Parameter]
    holds: torch.dtype | None = None

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, ``(out_features, in_features)``, rounded once. Not to be written to.

        A new tensor, unless codes are the values themselves, and in this dtype.
        """

    @abstractmethod
    def codes_of(self, weight: Tensor) -> nn.Parameter:
        """Another dense weight ``(out_features, in_features)`` as codes in the format of this layer.

        Raises:
            QuantizationError: If a value is not finite.
        """

    def dense_weight(self) -> Tensor:
        """:meth:`dequantize` to at least fp32."""
        return self.dequantize(torch.promote_types(torch.float32, self.dense_dtype))

    def requantize(self, weight: Tensor) -> None:
        """Take another dense weight ``(out_features, in_features)``, in the same format."""
        self.weight = self.codes_of(weight)
        if self.quantized_from is not None:
            self.quantized_from = weight.dtype

    @abstractmethod
    def constants(self) -> dict[str, Tensor]:
        """The scales that belong to the codes, by their keys in the layer's state dict."""

    @abstractmethod
    def code_keys(self) -> tuple[str, ...]:
        """Keys of the layer's state dict that are no parameters."""

    def is_intact(self) -> bool:
        """False where the codes can't be what a quantization made."""
        return True

    @abstractmethod
    def describe(self) -> str:
        """The format, such as ``"nf4 (double)"``."""

    @abstractmethod
    def _is_own(self, key: str) -> bool:
        """Whether a key of the layer's state dict is of the codes or their scales."""

    @abstractmethod
    def _take(self, saved: dict[str, Tensor]) -> list[str]:
        """Take codes with their scales, or a dense weight, by their keys; returns what is wrong with them."""

    @abstractmethod
    def _move_constants(self, device: torch.device) -> None:
        """Move what is beside the codes."""

    @override
    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.describe()}"

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Codes move, but are never cast: those that are stored as floating-point numbers would be rounded.
        weight = self.weight
        dense = fn(torch.empty(0, dtype=self.dense_dtype, device=weight.device))

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = weight.data.to(dense.device) if tensor is weight else fn(tensor)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._move_constants(self.weight.device)
        self.dense_dtype = dense.dtype
        return self

    @override
    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Unpickled parameters are plain ones, whatever they were, and a deep copy of such a one has no scales.
        if type(self.weight) is nn.Parameter:
            self.weight.__class__ = self.parameter_class

    @override
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
        # A dense weight is quantized: a base may be loaded at any time, as if it had not been quantized yet.
        inside = {key: key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        own = {name: state_dict[key] for key, name in inside.items() if self._is_own(name)}
        rest = {key: state_dict[key] for key, name in inside.items() if name not in own}
        absent: list[str] = []
        nn.Module._load_from_state_dict(self, rest, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        missing_keys += [key for key in absent if key != f"{prefix}weight" or "weight" not in own]
        if "weight" in own:
            try:
                error_msgs += [f"{prefix}weight: {error}" for error in self._take(own)]
            except QuantizationError as error:
                error_msgs.append(f"{prefix}weight: {error}")


def dense_numel(parameter: Tensor) -> int:
    """Number of values of a parameter: two to each byte of 4-bit codes."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
