"""Fill a module that was built without values from files, tensor by tensor: the whole base is never in memory dense."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError, QuantizationError
from lightning_lora.weight_files import WeightFiles

Place = tuple[nn.Module, str, str]  # who holds the tensor, as what, and the dotted name that this makes


@contextmanager
def empty_weights() -> Iterator[None]:
    """Within this context modules are built with parameters on the meta device, and real buffers.

    ``with torch.device("meta")`` leaves buffers that no file holds, such as tables of position encodings, without
    values, too.

    Example:
        >>> with empty_weights():
        ...     net = nn.Linear(70_000, 70_000)
        >>> net.weight.device.type
        'meta'
    """
    register: Any = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stream_weights(
    module: nn.Module,
    files: WeightFiles,
    *,
    quantize: Callable[[nn.Module, Tensor], Any] | None = None,
    names: Collection[str] = (),
) -> None:
    """Give every tensor of ``module`` on the meta device its value from ``files``.

    Args:
        module: Any module; parameters with values, and the buffers beside them, stay as they are.
        files: Their names are those of the module, of a module inside it, or of one that it is inside of.
        quantize: Gets a layer called in ``names`` and its dense weight.
        names: Layers to quantize.

    Raises:
        BaseMismatchError: If a tensor is not in the files or has another shape; nothing is changed then.
    """
    places = _without_values(module)
    found = _found_by_any_name(module, files, places)
    _refuse_missing(module, files, places, found)
    layers = {id(module.get_submodule(name)) for name in names}
    for key, source in found.items():
        value = files.read(source)
        holder: Any
        holder, name, _ = places[key][0]
        if quantize is not None and name == "weight" and id(holder) in layers:
            try:
                quantize(holder, value.to(holder.weight.dtype))
            except QuantizationError as error:
                raise QuantizationError(f"{key!r} can't be quantized: {error}.") from None
        else:
            _fill(places[key], value)


def _without_values(module: nn.Module) -> dict[str, list[Place]]:
    """Tensors of the state dict to fill: first name -> everywhere that it is held.

    Buffers count, too, unless a parameter beside them has values: :func:`empty_weights` leaves the statistics of a norm
    layer as they are in a new one.
    """
    places: dict[int, tuple[str, list[Place]]] = {}
    for prefix, child in module.named_modules():
        persistent = {k: v for k, v in child._buffers.items() if k not in child._non_persistent_buffers_set}
        wanted = not any(p is not None and not p.is_meta for p in child._parameters.values())
        for key, tensor in [*child._parameters.items(), *persistent.items()]:
            if tensor is not None and (tensor.is_meta or (key in persistent and wanted)):
                name = f"{prefix}.{key}".lstrip(".")
                places.setdefault(id(tensor), (name, []))[1].append((child, key, name))
    return dict(places.values())


def _found_by_any_name(module: nn.Module, files: WeightFiles, places: dict[str, list[Place]]) -> dict[str, str]:
    """What each tensor is called in the files, which need to hold a tied one only once, by whichever of its names."""
    found = match_names(module, files, places)
    others = {name: first for first, held in places.items() if first not in found for _, _, name in held[1:]}
    if others:
        again = match_names(module, files, [*found, *others])
        found |= {others[name]: source for name, source in again.items() if name in others}
    return found


def match_names(module: nn.Module, files: WeightFiles, names: Collection[str]) -> dict[str, str]:
    """Which of ``names`` of ``module`` is called what in the files, by the prefixes under which most are found."""
    inner = [f"{name}." if name else "" for name, _ in module.named_modules() if name.count(".") < 3]
    outer = ["", *sorted({f"{name.split('.')[0]}." for name in files.files if "." in name})]
    found: list[dict[str, str]] = [{}]
    for prefix, other in itertools.product(inner, outer):
        pairs = {name: other + name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        pairs = {name: source for name, source in pairs.items() if source in files.files}
        if pairs and all(name == source for name, source in pairs.items()) and len(pairs) == len(names):
            return pairs
        found.append(pairs)
    best = max(found, key=len)
    rival = next((pairs for pairs in found if pairs.keys() == best.keys() and pairs != best), None)
    if rival is not None:
        one, other = next((a, b) for a, b in zip(best.values(), rival.values(), strict=True) if a != b)
        raise BaseMismatchError(
            f"{files.source} holds the module's tensors twice, such as {one!r} and {other!r}. Save the one that is "
            "meant to a file of its own."
        )
    return best


def _refuse_missing(
    module: nn.Module, files: WeightFiles, places: dict[str, list[Place]], found: dict[str, str]
) -> None:
    for prefix, child in module.named_modules():
        for key in child._non_persistent_buffers_set:
            if child._buffers.get(key) is not None and child._buffers[key].is_meta:
                raise BaseMismatchError(
                    f"The buffer {f'{prefix}.{key}'.lstrip('.')!r} has no values, and no file holds it. Build the "
                    "module within lightning_lora.empty_weights(), which gives only parameters no values."
                )
    missing = [name for name, held in places.items() if name not in found and getattr(*held[0][:2]).is_meta]
    if missing:
        raise BaseMismatchError(
            f"{len(missing)} of {len(places)} tensors of {type(module).__name__} are not in {files.source}, such as "
            f"{missing[0]!r} (it holds names like {next(iter(files.files), 'none')!r}). Load the weights of this "
            "model, or give the others values before."
        )
    for name, source in found.items():
        holder, key, _ = places[name][0]
        expected = tuple(getattr(holder, key).shape)
        if files.shape(source) != expected:
            raise BaseMismatchError(
                f"{source!r} is {files.shape(source)} in {files.source}, and {name!r} {expected} here."
            )


def _fill(places: list[Place], value: Tensor) -> None:
    """Put a value wherever the same tensor is held, so that tied tensors stay tied."""
    holder, key, _ = places[0]
    empty = getattr(holder, key)
    tensor: Any = value.to(empty.dtype, copy=True)
    if isinstance(empty, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=empty.requires_grad)
    for holder, key, _ in places:
        store = holder._parameters if key in holder._parameters else holder._buffers
        store[key] = tensor
