"""8-bit weights with one scale a row (LLM.int8(), arXiv:2208.07339, section 2), in a layer that never rewrites itself.

Inputs are not quantized: as bitsandbytes itself does in training on a CPU, the weight is dequantized for a moment. So
training and evaluation compute the same, and a merge into the dequantized weight is the live module.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt
from torch import Tensor
from typing_extensions import override

from lightning_lora.errors import QuantizationError
from lightning_lora.quantization.product import product
from lightning_lora.quantized_layer import QuantizedLayer

_CHUNK = 2**14  # values; larger pieces stay in glibc's heap
_KEYS = ("weight", "SCB", "weight_format")


class QuantizedLinear8bit(QuantizedLayer, Linear8bitLt):
    """A frozen linear layer in 8 bits. ``weight`` holds the codes, ``(out_features, in_features)``, int8."""

    weight: Int8Params
    parameter_class = Int8Params

    @property
    def state(self) -> MatmulLtState:  # type: ignore[override]
        """What bitsandbytes' own methods read: the codes and scales under their other names."""
        state = MatmulLtState(CB=self.weight.data, SCB=self.weight.SCB)
        state.has_fp16_weights = False
        return state

    @override
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self)

    @override
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        scales = (self.weight.SCB / 127.0).unsqueeze(1)
        # Multiplied in fp32 and rounded once, without a copy of the weight in fp32.
        return torch.mul(self.weight.data, scales, out=torch.empty_like(self.weight.data, dtype=dtype))

    @override
    def codes_of(self, weight: Tensor) -> Int8Params:
        return quantize(weight.to(self.weight.device))

    @override
    def constants(self) -> dict[str, Tensor]:
        return {"SCB": self.weight.SCB}

    @override
    def code_keys(self) -> tuple[str, ...]:
        return _KEYS[1:]

    @override
    def is_intact(self) -> bool:
        if self.weight.is_meta or not self.weight.numel():
            return True
        largest = self.weight.data.view(torch.int8).abs().amax(dim=1)  # of every row: what its scale stands for
        return bool(((largest == 127) | (self.weight.SCB == 0)).all())

    @override
    def describe(self) -> str:
        return "int8"

    @override
    def _move_constants(self, device: torch.device) -> None:
        self.weight.CB, self.weight.SCB = self.weight.data, self.weight.SCB.to(device)

    @override
    def _is_own(self, key: str) -> bool:
        return key in _KEYS

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if not keep_vars:
            # A dense layer would take codes of its weight's shape for the weight: transformers casts them, and says
            # nothing. As a column, as 4-bit codes are, it refuses them.
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].view(-1, 1)

    @override
    def _take(self, saved: dict[str, Tensor]) -> list[str]:
        found, scales = saved["weight"].detach().as_subclass(Tensor), saved.get("SCB")
        shape = (self.out_features, self.in_features)
        if tuple(found.shape) == (self.weight.numel(), 1) and found.dtype == torch.int8:
            found = found.view(shape)
        if tuple(found.shape) != shape:
            return [f"{tuple(found.shape)} in the file and {shape} here"]
        if found.is_floating_point():
            self.requantize(found.to(self.dense_dtype))
        elif found.dtype != torch.int8 or scales is None or scales.shape != self.weight.SCB.shape:
            return [f"{found.dtype} in the file, without the scales of 8-bit codes beside it"]
        else:
            device = self.weight.device
            self.weight = as_parameter(found.to(device, copy=True), scales.detach().to(device, copy=True))
        return []


def quantize(weight: Tensor) -> Int8Params:
    """Codes of a dense weight ``(out_features, in_features)`` with the largest magnitude of each row, fp32.

    Raises:
        QuantizationError: If a value is not finite: its whole row would be lost.
    """
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // max(1, weight.shape[1])) if weight.device.type == "cpu" else len(weight)
    # bitsandbytes rounds the weight to fp16 first, which overflows beyond 65504 and loses what is below 6e-8.
    for part, target, scale in zip(*(torch.split(t, rows) for t in (weight, codes, scales)), strict=True):
        scale.copy_(part.abs().amax(dim=1))
        target.copy_((part.float() * (127.0 / scale.clamp(min=1e-30)).unsqueeze(1)).round_().clamp_(-127, 127))
    if not torch.isfinite(scales).all():
        raise QuantizationError("its weight holds values that are not finite")
    return as_parameter(codes, scales)


def adopt(weight: Int8Params, state: MatmulLtState) -> Int8Params:
    """The weight of a layer of bitsandbytes, quantized if it is not yet, with the scales on it.

    Raises:
        QuantizationError: If a value is not finite.
    """
    scales = weight.SCB if weight.SCB is not None else state.SCB
    return quantize(weight.data) if scales is None else as_parameter(weight.data, scales)


def as_parameter(codes: Tensor, scales: Tensor) -> Int8Params:
    """The parameter of bitsandbytes around codes ``(out_features, in_features)`` and scales ``(out_features,)``."""
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
