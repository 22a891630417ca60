"""Recognise the base that adapters were trained on: names, shapes and a sample of the values of its parameters.

A sample can't see an edit of values that it does not contain; it tells models, sizes, seeds and training states apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.record import Record
from lightning_lora.targets.patterns import canonical

SAMPLES_PER_TENSOR = 8


def base_fingerprint(module: nn.Module, record: Record) -> dict[str, Any]:
    """The fingerprint of the frozen parameters of a module.

    Args:
        module: A module with adapters that are not merged.
        record: Its record; what is trained on purpose is no part of the base.

    Returns:
        Plain types and one tensor: ``tensors`` maps names to ``[dtype, *shape]``; ``samples`` is fp32 and flat, up to
        ``SAMPLES_PER_TENSOR`` evenly spaced values of each tensor in turn.
    """
    base = _base_parameters(module, record)
    samples = [_sample(parameter) for parameter in base.values()]
    return {
        "tensors": {name: [str(p.dtype).removeprefix("torch."), *p.shape] for name, p in base.items()},
        "samples": torch.cat(samples).cpu() if samples else torch.zeros(0),
    }


def is_fingerprint(value: Mapping[str, Any]) -> bool:
    """Whether ``value`` has the form that :func:`base_fingerprint` returns."""
    tensors, samples = value.get("tensors"), value.get("samples")
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and _is_entry(e) for n, e in tensors.items()):
        return False
    if not isinstance(samples, Tensor) or samples.ndim != 1 or samples.dtype != torch.float32:
        return False
    return len(samples) == sum(_lengths(tensors))


def describe_difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Compare two fingerprints.

    A base may be compared across a change of precision (``precision="bf16-true"`` converts after a checkpoint is
    loaded): values then have to agree to the rounding of the coarser dtype, else exactly.

    Returns:
        What differs, as a clause for a message, or None.
    """
    names, others = found["tensors"], expected["tensors"]
    if set(names) != set(others):
        only_file, only_module = sorted(set(names) - set(others)), sorted(set(others) - set(names))
        return f"parameters only in the file: {_some(only_file)}; only in the module: {_some(only_module)}"
    shapes = [name for name in names if names[name][1:] != others[name][1:]]
    if shapes:
        name = shapes[0]
        return f"{len(shapes)} shapes differ, such as {name}: {names[name][1:]} in the file, {others[name][1:]} here"
    ours, theirs = _by_tensor(expected), _by_tensor(found)
    different = [name for name in names if not _agree(theirs[name], ours[name], names[name][0], others[name][0])]
    return (
        f"the values of {len(different)} of {len(names)} parameters differ: {_some(different)}" if different else None
    )


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        return False
    known = isinstance(getattr(torch, entry[0], None), torch.dtype)
    return known and all(isinstance(size, int) and size >= 0 for size in entry[1:])


def _base_parameters(module: nn.Module, record: Record) -> dict[str, Tensor]:
    adapters = {id(p) for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()}
    saved = set(record.saved)
    return {
        canonical(name): parameter.detach()
        for name, parameter in module.named_parameters()
        if id(parameter) not in adapters and canonical(name) not in saved and not parameter.is_meta
    }


def _sample(tensor: Tensor) -> Tensor:
    size = tensor.numel()
    spaced = tensor.contiguous().as_strided((min(size, SAMPLES_PER_TENSOR),), (max(1, size // SAMPLES_PER_TENSOR),))
    return spaced.to(torch.float32)


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
