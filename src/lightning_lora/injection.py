"""Put adapters into a module and take them out: freeze the base, swap the chosen layers, note how to undo it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.class_swap import original_class
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import MergeError, TargetNotFoundError, UnsupportedSetupError
from lightning_lora.fresh import newly_initialized
from lightning_lora.frozen import keep_base_as_is, release_base
from lightning_lora.layers import AdaptedLayer, adapted_layers, attach_adapter, detach_adapters, note_siblings
from lightning_lora.originals import named_state, note_values, restore_values
from lightning_lora.patches import unpatch
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.conversion import adopt_foreign, release_foreign
from lightning_lora.quantized_base import check_codes, describe_quantized, note_format, quantize_base
from lightning_lora.quantized_layer import QuantizedLayer, dense_numel
from lightning_lora.record import Record, drop_record, find_nested_record, find_record, store_record
from lightning_lora.report import InjectionReport, LayerRow
from lightning_lora.streaming import stream_weights
from lightning_lora.targets import Pattern, Selection, select_targets
from lightning_lora.targets.patterns import canonical
from lightning_lora.weight_files import WeightFiles


def inject_adapters(
    module: nn.Module,
    config: AdapterConfig,
    *,
    name: str = "default",
    quantization: QuantizationConfig | None = None,
    base_weights: str | Path | None = None,
) -> InjectionReport:
    """Freeze ``module`` and give the layers that ``config`` means an adapter each, in place.

    No existing parameter, buffer, module path or hook changes its name or place, and outputs are bitwise those of the
    base until the adapter trains. Calling it again with the same config only adapts layers that have come since.
    After an error everything is as it was before the call, but for layers that had been quantized by then.

    Args:
        module: Any module.
        config: What to adapt and how, such as :class:`~lightning_lora.LoRAConfig`.
        name: Name of the adapter. A new name adds an adapter that is the only active one, and the only one that
            trains, in the whole module: layers that it does not target compute what the base does. A name that is
            there already changes nothing about which are active.
        quantization: Store the frozen linear layers in 4, 8 or 16 bits first. Layers that are so already are adapted as
            they are.
        base_weights: Where tensors of a module that was built without values (on the meta device, see
            :func:`~lightning_lora.empty_weights`) get them from, one at a time: a safetensors file, an index of sharded
            ones, a folder, or the name of a model on the Hugging Face hub. Names may differ by a prefix.

    Returns:
        What was adapted, what was skipped and why, and the counts.

    Raises:
        TargetNotFoundError: If a pattern or preset selects nothing that can be adapted.
        UnsupportedSetupError: If the module cannot be adapted rightly.
        QuantizationError: If the base can't be quantized, or was quantized and then repacked by bitsandbytes.
        ValueError: If ``name`` is no valid name, or is already there with another config.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> from lightning_lora import LoRAConfig
        >>> inject_adapters(net, LoRAConfig(rank=2)).trainable_parameters
        44
        >>> sorted(key for key in net.state_dict() if "lora" in key)[:2]
        ['0.adapters.default.lora_A', '0.adapters.default.lora_B']
    """
    report = extend_adapters(
        module, config, name=name, quantization=quantization, base_weights=base_weights, strict=True
    )
    assert report is not None
    return report


def extend_adapters(
    module: nn.Module,
    config: AdapterConfig,
    *,
    name: str = "default",
    quantization: QuantizationConfig | None = None,
    base_weights: str | Path | None = None,
    device: torch.device | None = None,
    rounded_to: torch.dtype | None = None,
    strict: bool,
) -> InjectionReport | None:
    """:func:`inject_adapters` for a module that may not be complete yet.

    Args:
        module: Any module.
        config: As in :func:`inject_adapters`.
        name: As in :func:`inject_adapters`.
        quantization: As in :func:`inject_adapters`.
        base_weights: As in :func:`inject_adapters`.
        device: Where to quantize; None: where the weights are.
        rounded_to: Dtype that weights are cast to before they are quantized; None: their own.
        strict: False adapts what is there already, accepts patterns that match nothing yet, and returns None where
            there is no layer to adapt.
    """
    if not strict and (quantization or base_weights) and any(p.is_meta for p in module.parameters()):
        return None  # what has no values yet is quantized before it gets adapters
    record = (find_record(module) or Record()).copy()
    _check(module, record, config, name)
    saved_modules, saved = _saved_names(module, config, strict=strict)
    with _all_or_nothing(module):
        adopt_foreign(module)
        _refuse_codes(module, saved)
        selection = select_targets(module, config, saved=frozenset(saved_modules), strict=strict)
        if not selection.targets:
            return None
        files = _files(module, record, base_weights) if strict else None
        if quantization is not None:
            quantize_base(
                module,
                record,
                config,
                quantization,
                saved=saved_modules,
                strict=strict,
                device=device,
                files=files,
                rounded_to=rounded_to,
            )
        elif files is not None:
            stream_weights(module, files)
        check_codes(module)
        note_format(module, record)
        record.saved = list(dict.fromkeys([*record.saved, *saved]))
        acts = _attach(module, selection, config, name, is_new=name not in record.configs)
        _freeze(module, record, name if acts else None)
        kept = keep_base_as_is(module, saved=record.saved)
        if strict:
            note_values(module, record)
        record.complete = record.complete or strict
        record.configs[name] = config
        record.report = _report(module, record, selection, config.kind, name, kept)
    store_record(module, record)
    return record.report


def remove_adapters(module: nn.Module) -> None:
    """Drop all adapters of ``module`` and make it exactly what it was before the injection.

    Modules that were trained in full, and buffers that the training changed, get their values from before the
    training back; what was built anew or loaded since the injection stays. Merged weights stay merged: only what would
    undo the merge is dropped. Layers that the injection quantized stay so.

    Args:
        module: The module that :func:`inject_adapters` or the callback was given.
    """
    record = find_record(module)
    if record is None:
        return
    if record.merged is None:
        restore_values(module, record)
        for _, layer in list(adapted_layers(module)):
            detach_adapters(layer)
    release_foreign(module)
    thaw(module, record)
    for attribute in record.patched:
        patched = module.__dict__.get(attribute)
        if isinstance(patched, functools.partial) and patched.func.__module__.startswith("lightning_lora."):
            unpatch(module, attribute, patched.func)
    drop_record(module)


def withdraw_incomplete(module: nn.Module) -> None:
    """Take out again what was adapted before the module was complete, if the rest could not be: all or nothing."""
    record = find_record(module)
    if record is not None and not record.complete:
        remove_adapters(module)


def thaw(module: nn.Module, record: Record) -> None:
    """Give every parameter and norm layer of the base back the flags that it had before the injection."""
    release_base(module)
    codes = {id(child.weight) for child in module.modules() if isinstance(child, QuantizedLayer)}
    for key, parameter in module.named_parameters():
        if canonical(key) in record.was_trainable and id(parameter) not in codes:
            parameter.requires_grad_(True)
        elif canonical(key) in record.was_frozen:
            parameter.requires_grad_(False)


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Within this context the base acts alone.

    Args:
        module: A module with adapters; every adapted layer inside it is affected.
    """
    layers = [layer for _, layer in adapted_layers(module)]
    active = [layer.active for layer in layers]
    for layer in layers:
        layer.active = ()
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            if isinstance(layer, AdaptedLayer):  # else its adapters were removed or merged meanwhile
                layer.active = names


def _check(module: nn.Module, record: Record, config: AdapterConfig, name: str) -> None:
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"config must be an adapter config such as LoRAConfig(...), got {config!r}.")
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {name!r} must be a Python identifier and no method of nn.ModuleDict.")
    if record.merged is not None:
        raise MergeError("The adapters of this module are merged. Call unmerge_adapters(module) first.")
    nested = find_nested_record(module)
    if nested is not None:
        raise UnsupportedSetupError(
            f"{nested!r} inside this module was already adapted by a call of its own. "
            "Call remove_adapters on it, or adapt only there."
        )
    foreign = next((path for path, child in module.named_modules() if _is_of_peft(child)), None)
    if foreign is not None:
        raise UnsupportedSetupError(
            f"{foreign!r} already has an adapter of PEFT, which would be frozen and adapted in turn. Call PEFT's "
            "merge_and_unload() first, or build the model without get_peft_model."
        )
    known = record.configs.get(name)
    if known is not None and known != config:
        raise ValueError(
            f"adapter {name!r} is already there with {known}. Call remove_adapters(module) first, or use another name."
        )


def _is_of_peft(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("peft.") and cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def _saved_names(module: nn.Module, config: AdapterConfig, *, strict: bool) -> tuple[set[str], list[str]]:
    """Modules that are trained in full, and the names of all their parameters and buffers."""
    modules = dict(module.named_modules(remove_duplicate=False))
    parameters = [key for key, _ in module.named_parameters(remove_duplicate=False)]
    owners: set[str] = set()
    saved = newly_initialized(module)
    for text in config.modules_to_save:
        pattern = Pattern(text)
        holders = [name for name in modules if name and pattern.matches(name)]
        direct = [key for key in parameters if pattern.matches(key)]
        if strict and not holders and not direct:
            nearest = ", ".join(map(repr, pattern.nearest([*modules, *parameters])))
            raise TargetNotFoundError(f"modules_to_save: {text!r} matches no module or parameter. Closest: {nearest}.")
        owners |= set(holders)
        saved += direct
        saved += [f"{name}.{key}" for name in holders for key in modules[name].state_dict()]
    return _under_all_names(module, owners, saved)


def _under_all_names(module: nn.Module, owners: set[str], saved: list[str]) -> tuple[set[str], list[str]]:
    """Add the other names of shared modules and tied tensors: they are trained, whatever they are called by."""
    modules = dict(module.named_modules(remove_duplicate=False))
    shared = {id(modules[name]) for name in owners}
    owners = {name for name, child in modules.items() if id(child) in shared}
    state = module.state_dict(keep_vars=True)
    tensors = {id(state[key]) for key in saved if isinstance(state.get(key), Tensor)}
    saved = [*saved, *(key for key, value in state.items() if id(value) in tensors)]
    # A layer whose bias alone is trained can carry an adapter.
    owners |= {owner for owner, _, key in (key.rpartition(".") for key in saved) if key == "weight"}
    return owners, list(dict.fromkeys(map(canonical, saved)))


def _files(module: nn.Module, record: Record, base_weights: str | Path | None) -> WeightFiles | None:
    """The files of a base without values; None where there is nothing to fill."""
    if base_weights is None:
        return None
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return WeightFiles(base_weights)
    if not record.configs:
        raise UnsupportedSetupError(
            f"base_weights={str(base_weights)!r} would be ignored: the module has values already. Build it within "
            "lightning_lora.empty_weights(), or load its weights yourself."
        )
    return None


def _refuse_codes(module: nn.Module, saved: list[str]) -> None:
    """Codes can't be trained: refuse to train in full what is stored so."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer) and canonical(f"{name}.weight".lstrip(".")) in saved:
            raise UnsupportedSetupError(
                f"modules_to_save: {name!r} is stored as {child.describe()} and can't be trained in full. Build the "
                "module anew and leave the layer dense (QuantizationConfig.skip_modules; in transformers "
                "llm_int8_skip_modules)."
            )


@contextmanager
def _all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Undo what was done to the layers and parameters in this context if it ends with an error."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    layers = {layer: (set(layer.adapters), layer.active) for _, layer in adapted_layers(module)}
    try:
        yield
    except BaseException:
        for _, layer in list(adapted_layers(module)):
            names, layer.active = layers.get(layer, (set(), ()))
            for name in set(layer.adapters) - names:
                del layer.adapters[name]
            if not names:
                detach_adapters(layer)
        record = find_record(module)
        if record is None:
            release_base(module)
            release_foreign(module)
        for parameter, requires_grad, grad in flags:
            if parameter.requires_grad != requires_grad:  # a lazy parameter can't even be asked to stay as it is
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        if record is not None:
            keep_base_as_is(module, saved=record.saved)
        raise


def _attach(module: nn.Module, selection: Selection, config: AdapterConfig, name: str, *, is_new: bool) -> bool:
    """Add the adapters; returns whether they act: a new name acts alone, a known one as it does on other layers."""
    before = {layer: layer.active for _, layer in adapted_layers(module)}
    acts = is_new or not any(before.values()) or any(name in active for active in before.values())
    for target in selection.targets:
        layer = attach_adapter(module.get_submodule(target.name), name)
        if name not in layer.adapters:
            layer_name = canonical(target.name)
            adapter = config.make_adapter(layer, layer_name=layer_name, rank=target.rank, alpha=target.alpha)
            layer.adapters[name] = adapter.train(layer.training).requires_grad_(acts)
            layer.active = (name,) if acts else before.get(layer, ())
    if is_new:
        for layer in before:
            layer.active = layer.active if name in layer.adapters else ()
    note_siblings(module)
    return acts


def _freeze(module: nn.Module, record: Record, name: str | None) -> None:
    """Leave trainable what is trained in full and, of the adapters, those called ``name`` (None: those that are)."""
    adapters = {
        id(parameter): path.endswith(f".{name}") or path == name
        for path, child in module.named_modules()
        if isinstance(child, Adapter)
        for parameter in child.parameters()
    }
    state = named_state(module)
    saved = {id(state[key]) for key in record.saved if key in state}
    for key, parameter in module.named_parameters():
        if id(parameter) in adapters:
            if name is not None:
                parameter.requires_grad_(adapters[id(parameter)])
        elif id(parameter) in saved:
            if not parameter.requires_grad:
                record.was_frozen.add(canonical(key))
                parameter.requires_grad_(True)
        else:
            if parameter.requires_grad:
                record.was_trainable.add(canonical(key))
                parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer moves a frozen parameter that still holds a gradient


def _report(
    module: nn.Module, record: Record, selection: Selection, kind: str, name: str, kept_norms: list[str]
) -> InjectionReport:
    rows = tuple(_row(path, layer, name) for path, layer in adapted_layers(module) if name in layer.adapters)
    parameters = {canonical(key): parameter for key, parameter in module.named_parameters()}
    notes = []
    if kept_norms:
        notes.append(f"{len(kept_norms)} norm layers keep their running statistics (they stay in eval mode)")
    notes += describe_quantized(module)
    return InjectionReport(
        adapter=name,
        kind=kind,
        layers=rows,
        trainable_parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        total_parameters=sum(map(dense_numel, parameters.values())),
        saved={key: parameters[key].numel() for key in record.saved if key in parameters},
        skipped=dict(selection.skipped),
        notes=tuple(notes),
    )


def _row(path: str, layer: AdaptedLayer, name: str) -> LayerRow:
    adapter = layer.adapter(name)
    trainable = sum(parameter.numel() for parameter in adapter.parameters())
    own = sum(dense_numel(parameter) for parameter in layer.parameters(recurse=False))
    return LayerRow(
        name=path,
        type=original_class(layer).__name__,
        shape=layer.matrix_shape,
        rank=adapter.rank,
        alpha=adapter.alpha,
        scaling=adapter.scaling,
        trainable=trainable,
        total=trainable + own,
    )
