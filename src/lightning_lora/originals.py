"""The values that a module's own tensors had at the injection: to tell what the training changed, and to undo it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from lightning_lora.fingerprint import base_fingerprint, describe_difference, survey
from lightning_lora.record import Record
from lightning_lora.targets.patterns import canonical


def note_values(module: nn.Module, record: Record) -> None:
    """Note what a removal has to bring back, of a module that is complete: a user's setup() may rebuild the head."""
    state = named_state(module)
    for key in record.saved:
        value, noted = state.get(key), record.originals.get(key)
        if _is_dense(value) and (noted is None or noted.shape != value.shape):
            record.originals[key] = value.detach().cpu().clone()
    for key, buffer in base_buffers(module, record):
        if canonical(key) not in record.buffers:
            record.buffers[canonical(key)] = buffer.detach().cpu().clone()
    record.base = record.base or base_fingerprint(module, record)


@torch.no_grad()
def restore_values(module: nn.Module, record: Record) -> None:
    """Bring back what :func:`note_values` noted, where the same tensors are still there."""
    originals = dict(record.originals)
    if record.base is not None and describe_difference(record.base, base_fingerprint(module, record)) is None:
        originals.update(record.buffers)
    state = named_state(module)
    for key, original in originals.items():
        value = state.get(key)
        if isinstance(value, Tensor) and value.shape == original.shape and not value.is_meta:
            value.copy_(original)


def named_state(module: nn.Module) -> dict[str, Any]:
    """The state dict with the parameters and buffers themselves, under canonical names."""
    return {canonical(key): value for key, value in module.state_dict(keep_vars=True).items()}


def base_buffers(module: nn.Module, record: Record) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers of the base whose values can be noted and compared.

    That is everything in the state dict that is neither parameter nor trained, but for extra states, which belong to
    the run, and for tensors of unusual storage (sparse, quantized, without data).
    """
    contents = survey(module)
    others = {canonical(key) for key in contents.adapter_keys()} | set(record.saved) | contents.codes
    others |= contents.parameters.keys()
    for key, value in module.state_dict().items():
        if canonical(key) not in others and _is_dense(value) and not is_extra_state(key):
            yield key, value


def is_extra_state(key: str) -> bool:
    """Whether an entry of a state dict is what a module's ``get_extra_state`` returned: anything, not only tensors."""
    return key.rpartition(".")[2] == "_extra_state"


def has_values_of(tensor: Tensor, original: Tensor) -> bool:
    """Whether a tensor is, bit for bit, ``original`` or what a cast to its dtype makes of it."""
    return (
        _is_dense(tensor)
        and tensor.shape == original.shape
        and torch.equal(bits(tensor), bits(original.to(tensor.dtype)))
    )


def _is_dense(value: object) -> TypeIs[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and not value.is_nested
    )


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor: a NaN equals itself, and -0.0 is not 0.0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
