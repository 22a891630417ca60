"""NF4 and FP4 (QLoRA, arXiv:2305.14314): bitsandbytes' codes in a layer that never rewrites itself.

bitsandbytes' own ``Linear4bit`` repacks its weight in an evaluation on some CPUs, after which training gets no
gradient and dequantizing gives garbage; it casts its bias in place to the first input's dtype; and it can't load its
own state dict.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import QuantizationError
from lightning_lora.quantization.clipping import clip_blocks
from lightning_lora.quantization.product import product
from lightning_lora.quantized_layer import QuantizedLayer

# Without a GPU bitsandbytes quantizes with torch operations that take 20 bytes a value for a moment, and pieces above
# 128 KiB stay in glibc's heap. A multiple of all block sizes: the codes are those of the whole weight in one go.
_CHUNK = 2**14


class QuantizedLinear4bit(QuantizedLayer, Linear4bit):
    """A frozen linear layer in 4 bits. ``weight`` holds the codes, ``(in_features * out_features / 2, 1)``, uint8."""

    weight: Params4bit
    parameter_class = Params4bit

    @property
    def quant_state(self) -> Any:  # type: ignore[override]
        """The ``QuantState`` of the codes; it lives on the weight, as copies and moves take it along there."""
        return self.weight.quant_state

    @override
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self)

    @override
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        state = copy.copy(self.weight.quant_state)
        state.dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        dense: Tensor = bnb.functional.dequantize_4bit(self.weight.data, state)
        return dense.to(dtype)

    @override
    def codes_of(self, weight: Tensor) -> Params4bit:
        searched = self.stored_as is not None and self.stored_as.clip_search
        return quantize(weight.to(self.weight.device), _settings(self.weight), clip_search=searched)

    @override
    def constants(self) -> dict[str, Tensor]:
        state = self.weight.quant_state
        found = {"weight.absmax": state.absmax}
        if state.nested:
            found |= {"weight.nested_absmax": state.state2.absmax}
        return found

    @override
    def code_keys(self) -> tuple[str, ...]:
        state = self.weight.quant_state
        keys = ("absmax", "quant_map", f"quant_state.bitsandbytes__{state.quant_type}")
        nested = ("nested_absmax", "nested_quant_map") if state.nested else ()
        return tuple(f"weight.{key}" for key in (*keys, *nested))

    @override
    def describe(self) -> str:
        state = self.weight.quant_state
        return f"{state.quant_type} (double)" if state.nested else str(state.quant_type)

    @override
    def _move_constants(self, device: torch.device) -> None:
        self.weight.quant_state.to(device)

    @override
    def _is_own(self, key: str) -> bool:
        return key == "weight" or key.startswith("weight.")

    @override
    def _take(self, saved: dict[str, Tensor]) -> list[str]:
        found = saved.pop("weight").detach().as_subclass(Tensor)
        if not saved:
            if tuple(found.shape) != (self.out_features, self.in_features) or not found.is_floating_point():
                return [f"{tuple(found.shape)} {found.dtype} in the file is neither a weight nor codes of it"]
            self.requantize(found.to(self.dense_dtype))
            return []
        device, old = self.weight.device, self.weight.quant_state
        parts = {name.removeprefix("weight."): value for name, value in saved.items()}
        try:
            state = QuantState.from_dict(parts, device=device)
        except (KeyError, ValueError, AttributeError, AssertionError, StopIteration) as error:
            return [f"the constants of its codes can't be read ({type(error).__name__}: {error})"]
        if _form(state) != _form(old):
            return [f"codes of {_form(state)} in the file; here {_form(old)}"]
        codes = found.to(device, copy=True).contiguous().view(-1).view(torch.uint8)
        size = (self.in_features * self.out_features + 1) // 2
        if not 0 <= len(codes) - size < found.element_size():
            return [f"{len(codes)} bytes of codes in the file; {size} are needed"]
        padded = nn.functional.pad(codes[:size], (0, -size % self.weight.element_size()))
        self.weight = _parameter(padded.view(self.weight.dtype).unsqueeze(1), state)
        return []


def quantize(weight: Tensor, settings: dict[str, Any], *, clip_search: bool = False) -> Params4bit:
    """Codes of a dense weight with their description, on the weight's device.

    Args:
        weight: ``(out_features, in_features)``; fp64 is rounded to fp32 first.
        settings: ``blocksize``, ``compress_statistics``, ``quant_type`` and ``quant_storage`` of bitsandbytes.
        clip_search: Clip each block where that makes its error smaller.

    Raises:
        QuantizationError: If a value is not finite: its whole block would be lost.
    """
    flat = weight.detach().contiguous().view(-1)
    block, kind, storage = settings["blocksize"], settings["quant_type"], settings["quant_storage"]
    size = _CHUNK if flat.device.type == "cpu" else flat.numel()
    room = -(-flat.numel() // 2)
    codes = torch.zeros(room + -room % storage.itemsize, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), size):
        chunk = flat[start : start + size]
        chunk = chunk.float() if chunk.dtype == torch.float64 else chunk
        if clip_search:
            chunk = clip_blocks(chunk, block_size=block, quant_type=kind)
        part, scales = torch.ops.bitsandbytes.quantize_4bit.default(chunk, block, kind, torch.uint8)
        codes[start // 2 :][: part.numel()] = part.view(-1)
        absmax[start // block :][: scales.numel()] = scales
    if not torch.isfinite(absmax).all():
        raise QuantizationError("its weight holds values that are not finite")
    return _parameter(codes.view(storage).unsqueeze(1), _describe(weight, absmax, settings))


def adopt(weight: Params4bit) -> Params4bit:
    """The weight of a layer of bitsandbytes, quantized if it is not yet, without its reference to the layer.

    Raises:
        QuantizationError: If a value is not finite.
    """
    if weight.quant_state is None:
        return quantize(weight.data, _settings(weight))
    weight.module = None  # a copy of the weight would keep the layer that it was copied from
    weight.__class__ = Params4bit  # a plain nn.Parameter after unpickling
    return weight


def _describe(weight: Tensor, absmax: Tensor, settings: dict[str, Any]) -> QuantState:
    state = QuantState(  # type: ignore[no-untyped-call]
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype if weight.dtype != torch.float64 else torch.float32,
        blocksize=settings["blocksize"],
        code=bnb.functional.get_4bit_type(  # type: ignore[no-untyped-call]
            settings["quant_type"], device=weight.device
        ),
        quant_type=settings["quant_type"],
    )
    if settings["compress_statistics"]:
        # As bitsandbytes.functional.quantize_4bit does, for scales that were found chunk by chunk.
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.functional.quantize_blockwise(absmax - state.offset, blocksize=256)
        state.nested = True
    return state


def _form(state: QuantState) -> str:
    """What codes and their description have to have in common with those that they replace."""
    shapes = [tuple(state.absmax.shape), *([tuple(state.state2.absmax.shape)] if state.nested else [])]
    return f"{state.quant_type}, {tuple(state.shape)} in blocks of {state.blocksize}, constants {shapes}"


def _parameter(codes: Tensor, state: QuantState) -> Params4bit:
    return Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=codes.dtype,
        bnb_quantized=True,
    )


def _settings(weight: Params4bit) -> dict[str, Any]:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return {name: getattr(weight, name) for name in names}
