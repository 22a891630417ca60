"""Tensors of the CPU without memory: they have shapes, dtypes and a device, and no values but those of small integers.

torch's own FakeTensor does the same and takes five times longer for each operator; transformers takes it for a sign of
tracing, and then computes another attention mask than in a real run.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora.errors import UnsupportedSetupError

_aten = torch.ops.aten
READ = _aten._local_scalar_dense.default
_SHAPED_BY_VALUES = {_aten.nonzero.default, _aten.masked_select.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_META = torch.device("meta")
LARGEST_KNOWN = 2**24  # elements of an integer tensor whose values are known


class WeightlessTensor(Tensor):
    """A tensor that says it is on the CPU, so that autocast and attention choose as they do there.

    Attributes:
        meta: The same on the meta device; its storage has a size, is shared by views, and ends with the last of them.
        value: What it holds, if that is known: integers and booleans that follow from known ones.
    """

    meta: Tensor
    value: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, value: Tensor | None = None) -> WeightlessTensor:  # noqa: D102
        made: WeightlessTensor = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            layout=meta.layout,
            device=torch.device("cpu"),
        )
        # A real operator on a tensor without memory would end the process.
        made.meta, made.value = meta, value.value if isinstance(value, WeightlessTensor) else value
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # the default looks at values
        return f"WeightlessTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


def without_memory() -> AbstractContextManager[Any]:
    """A context in which operators, those that create tensors too, compute shapes and take no memory."""
    return _WithoutMemory()  # type: ignore[no-untyped-call]


class _WithoutMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper takes longer than the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator on tensors without memory.

    Raises:
        UnsupportedSetupError: If the result, or its shape, depends on values that nobody knows before the run; a
            floating-point number that is read alone is NaN instead.
    """
    if func in _INDEXING:
        args = (args[0], _without_masks(args[1]), *args[2:])
    tensors: list[Tensor] = []
    meta_args = _on_meta(args, tensors)
    meta_kwargs = {key: _on_meta(value, tensors) for key, value in kwargs.items()}
    known = all(_value(tensor) is not None for tensor in tensors) and not _is_random(func)
    if func is READ or func in _SHAPED_BY_VALUES:
        if not known and func is READ and args[0].is_floating_point():
            return math.nan  # most often on its way to a log
        if not known:
            raise UnsupportedSetupError(f"the code looks at values that only a real run has ({func})")
        value = _really(func, args, kwargs)
        return WeightlessTensor(_to_meta(value), value) if isinstance(value, Tensor) else value
    result = func(*meta_args, **meta_kwargs)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # t_, unsqueeze_, ... change what the tensor itself says of its shape, too
            func(*args, **kwargs)
    inputs = {id(tensor.meta): tensor for tensor in tensors if isinstance(tensor, WeightlessTensor)}
    if isinstance(result, Tensor):
        wrapped = _wrapped(result, inputs)
        if not wrapped.is_floating_point() or wrapped.ndim == 0:
            wrapped.value = _really(func, args, kwargs) if known and wrapped.numel() <= LARGEST_KNOWN else None
        return wrapped
    if isinstance(result, (tuple, list)):
        return type(result)(_wrapped(item, inputs) if isinstance(item, Tensor) else item for item in result)
    return result


def _wrapped(result: Tensor, inputs: dict[int, WeightlessTensor]) -> WeightlessTensor:
    """A result of the meta device as a tensor of ours: an in-place operator returns the one that it changed."""
    known = inputs.get(id(result))
    return WeightlessTensor(result) if known is None else known


def _on_meta(item: Any, tensors: list[Tensor]) -> Any:
    """Arguments for the meta device; the tensors among them are added to ``tensors``."""
    if isinstance(item, Tensor):
        tensors.append(item)
        return item.meta if isinstance(item, WeightlessTensor) else _to_meta(item)
    if isinstance(item, (tuple, list)):
        return type(item)([_on_meta(part, tensors) for part in item])
    if isinstance(item, torch.Generator):
        return None  # of another device; nothing is drawn
    return _META if isinstance(item, torch.device) else item


def _really(func: Any, args: Any, kwargs: Any) -> Any:
    with no_dispatch():
        args, kwargs = pytree.tree_map_only(Tensor, _value, (args, kwargs))
        return func(*args, **kwargs)


def _value(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, WeightlessTensor):
        return tensor.value
    return None if tensor.is_meta else tensor


def _to_meta(tensor: Tensor) -> Tensor:
    with no_dispatch():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _without_masks(indices: Any) -> list[Tensor | None]:
    """Indices with every known mask replaced by the places that it marks, which has a shape without its values."""
    places: list[Tensor | None] = []
    for index in indices:
        value = _value(index) if isinstance(index, Tensor) and index.dtype == torch.bool else None
        if value is None:
            places.append(index)
            continue
        with no_dispatch():
            found = value.nonzero(as_tuple=True)
        places += [WeightlessTensor(_to_meta(place), place) for place in found]
    return places
