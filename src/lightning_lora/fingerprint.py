"""Recognise the base that adapters were trained on: names, shapes and a sample of the values of its tensors.

A sample can't see an edit of values that it does not contain; it tells models, sizes, seeds and training states apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import AdaptedLayer
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import Record
from lightning_lora.targets.patterns import canonical

SAMPLES_PER_TENSOR = 8


def base_fingerprint(module: nn.Module, record: Record) -> dict[str, Any]:
    """The fingerprint of the frozen parameters of a module.

    Args:
        module: A module with adapters that are not merged.
        record: Its record; what is trained on purpose is no part of the base.
    """
    return fingerprint(survey(module).base(record))


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fingerprint of named dense tensors.

    Returns:
        Plain types and one tensor: ``tensors`` maps names to ``[dtype, *shape]``; ``samples`` is fp32 and flat, up to
        ``SAMPLES_PER_TENSOR`` evenly spaced values of each tensor in turn, its first and its last among them.
    """
    samples = [part for tensor in tensors.values() for part in _sample(tensor)]
    return {
        "tensors": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()},
        "samples": torch.cat(samples).cpu() if samples else torch.zeros(0),
    }


@dataclass
class Contents:
    """What a module holds.

    Attributes:
        layers: Prefix of its keys, such as ``"net.0."`` -> adapted layer, under every name of a shared one.
        parameters: Canonical name -> parameter, under every name of a shared one; without those of adapters, with
            the scales of quantized layers.
        codes: State-dict keys of quantized layers that are no parameters, canonical.
    """

    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)

    def adapter_keys(self) -> set[str]:
        """State-dict keys of all adapter tensors."""
        return {
            f"{prefix}adapters.{name}.{key}"
            for prefix, layer in self.layers.items()
            for name, adapter in layer.adapters.items()
            for key in adapter.state_dict()
        }

    def base(self, record: Record) -> dict[str, Tensor]:
        """The parameters that are not trained, each under its first name."""
        saved = set(record.saved)
        first: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            first.setdefault(id(parameter), name)
        names = (name for name in first.values() if name not in saved)
        return {name: self.parameters[name] for name in names if not self.parameters[name].is_meta}


def survey(module: nn.Module) -> Contents:
    """Look through a module once.

    ``named_modules`` and ``named_parameters`` pass each item through as many generators as it lies deep, which took
    most of the time of a save.
    """
    found = Contents()
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:
        prefix, child = waiting.pop()
        for key, parameter in child._parameters.items():
            if parameter is not None:
                found.parameters[canonical(prefix + key)] = parameter
        if isinstance(child, QuantizedLayer):
            found.parameters |= {canonical(prefix + key): scales for key, scales in child.constants().items()}
            found.codes |= {canonical(prefix + key) for key in child.code_keys()}
        inside = child._modules
        if isinstance(child, AdaptedLayer):
            found.layers[prefix] = child
            inside = {key: held for key, held in inside.items() if key != "adapters"}
        if inside:
            held_inside = [(f"{prefix}{key}.", held) for key, held in inside.items() if held is not None]
            waiting += reversed(held_inside)
    return found


def is_fingerprint(value: Mapping[str, Any]) -> bool:
    """Whether ``value`` has the form that :func:`base_fingerprint` returns."""
    tensors, samples = value.get("tensors"), value.get("samples")
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and _is_entry(e) for n, e in tensors.items()):
        return False
    if not isinstance(samples, Tensor) or samples.ndim != 1 or samples.dtype != torch.float32:
        return False
    return len(samples) == sum(_lengths(tensors))


def describe_difference(found: dict[str, Any], expected: dict[str, Any], *, what: str = "parameters") -> str | None:
    """Compare two fingerprints of parameters, or ``what`` else.

    A base may be compared across a change of precision (``precision="bf16-true"`` converts after a checkpoint is
    loaded): values then have to agree to the rounding of the coarser dtype, else exactly.

    Returns:
        What differs, as a clause for a message, or None.
    """
    names, others = found["tensors"], expected["tensors"]
    if set(names) != set(others):
        only_file, only_module = sorted(set(names) - set(others)), sorted(set(others) - set(names))
        return f"{what} only in the file: {_some(only_file)}; only in the module: {_some(only_module)}"
    shapes = [name for name in names if names[name][1:] != others[name][1:]]
    if shapes:
        name = shapes[0]
        return f"{len(shapes)} shapes differ, such as {name}: {names[name][1:]} in the file, {others[name][1:]} here"
    ours, theirs = _by_tensor(expected), _by_tensor(found)
    different = [name for name in names if not _agree(theirs[name], ours[name], names[name][0], others[name][0])]
    return f"the values of {len(different)} of {len(names)} {what} differ: {_some(different)}" if different else None


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        return False
    known = isinstance(getattr(torch, entry[0], None), torch.dtype)
    return known and all(isinstance(size, int) and size >= 0 for size in entry[1:])


def _sample(tensor: Tensor) -> list[Tensor]:
    flat = tensor.contiguous()  # no copy for nearly every tensor
    size, last = flat.numel(), SAMPLES_PER_TENSOR - 1
    if size <= SAMPLES_PER_TENSOR:
        parts = [flat.view(-1)]
    else:
        # Rows that were added at the end of an embedding are new at every build: the very last value has to be there.
        parts = [
            flat.as_strided((last,), ((size - 1) // last,)),
            flat.as_strided((1,), (1,), flat.storage_offset() + size - 1),
        ]
    return [(part.real + part.imag if part.is_complex() else part).to(torch.float32) for part in parts]


def _by_tensor(fingerprint: dict[str, Any]) -> dict[str, Tensor]:
    tensors = fingerprint["tensors"]
    return dict(zip(tensors, fingerprint["samples"].split(_lengths(tensors)), strict=True))


def _lengths(tensors: Mapping[str, list[Any]]) -> list[int]:
    return [min(math.prod(entry[1:]), SAMPLES_PER_TENSOR) for entry in tensors.values()]


def _agree(a: Tensor, b: Tensor, dtype: str, other: str) -> bool:
    if dtype == other:
        return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    dtypes = [getattr(torch, name) for name in (dtype, other)]
    if not all(d.is_floating_point for d in dtypes):
        return False
    rounding = max(torch.finfo(d).eps for d in dtypes)
    return torch.allclose(a, b, rtol=2 * rounding, atol=1e-7, equal_nan=True)  # fp16 loses what is below 6e-8


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "") or "none"
