"""The state of an optimizer over one flat tensor, and the same over the tensors that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.flat.tensors import FlatTensors


def join(states: Sequence[Mapping[str, Any]], flat: FlatTensors) -> dict[str, Any]:
    """One state of many: values in a parameter's shape one after the other, single numbers once.

    Raises:
        UnsupportedSetupError: If parameters have different keys, or another number of steps.
    """
    joined: dict[str, Any] = {}
    if any(state.keys() != states[0].keys() for state in states):
        raise UnsupportedSetupError(_DIFFERENT.format("some parameters have a state, and others have none"))
    for key in states[0]:
        values = [state[key] for state in states]
        if _are_in_shape(values, flat):
            joined[key] = torch.cat([value.reshape(-1) for value in values])
        elif all(_is_number(value) and _equal(value, values[0]) for value in values):
            joined[key] = values[0].clone() if isinstance(values[0], Tensor) else values[0]
        else:
            raise UnsupportedSetupError(_DIFFERENT.format(f"their {key!r} differs"))
    return joined


_DIFFERENT = (
    "FlatOptimizer: the states of the parameters can't be those of one tensor ({}). Leave the callback out of this run."
)


def split(state: Mapping[str, Any], flat: FlatTensors) -> list[dict[str, Any]]:
    """Undo :func:`join`: a state for each parameter, of views and copies."""
    states: list[dict[str, Any]] = [{} for _ in flat.parameters]
    for key, value in state.items():
        if _is_in_shape_of(flat.whole, value):
            parts: list[Any] = [*flat.parts(value)]
        else:
            parts = [value.clone() if isinstance(value, Tensor) else value for _ in states]
        for own, part in zip(states, parts, strict=True):
            own[key] = part
    return states


def require_divisible(state: Mapping[str, Any], flat: FlatTensors) -> None:
    """Refuse a state that :func:`split` could not divide among the parameters.

    Raises:
        UnsupportedSetupError: With the key.
    """
    for key, value in state.items():
        if not _is_number(value) and not _is_in_shape_of(flat.whole, value):
            raise UnsupportedSetupError(
                f"FlatOptimizer: the optimizer keeps {key!r} in a form that is neither that of its parameter nor one "
                "number, and it could not be saved. Leave the callback out."
            )


def _is_in_shape_of(parameter: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _are_in_shape(values: Sequence[Any], flat: FlatTensors) -> bool:
    return all(map(_is_in_shape_of, flat.parameters, values))


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
