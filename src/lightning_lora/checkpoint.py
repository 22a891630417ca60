"""Adapter-only checkpoints: keep what was trained, note what it was trained on, and load it back strictly.

Works on the plain dict that Lightning saves and loads; Lightning itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint_file import MANIFEST
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, CheckpointError, MergeError
from lightning_lora.fingerprint import Contents, describe_difference, fingerprint, is_fingerprint, survey
from lightning_lora.hyperparameters import opens_safely
from lightning_lora.layers import AdaptedLayer
from lightning_lora.originals import base_buffers, has_values_of, is_extra_state
from lightning_lora.quantization.config import COMPUTE_DTYPES, QuantizationConfig
from lightning_lora.quantized_base import quantized_from
from lightning_lora.record import Record, find_record
from lightning_lora.targets.patterns import canonical
from lightning_lora.version import __version__

FORMAT = 1
# WeightAveraging keeps the averaged state under "state_dict" and the live one under the second key.
STATES = ("state_dict", "current_model_state")


def adapter_keys(module: nn.Module) -> set[str]:
    """State-dict keys of all adapter tensors of ``module``, under every name of a shared layer."""
    return survey(module).adapter_keys()


def strip_base(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Make a checkpoint adapter-only, in place, and add the manifest.

    Args:
        module: The module with live adapters whose state the checkpoint holds.
        checkpoint: What Lightning is about to save.

    Raises:
        CheckpointError: If an adapter tensor is missing from the state, or what a module keeps as its extra state is
            no plain value: the file would be useless.
    """
    record = _live_record(module)
    contents = survey(module)
    layers = _by_first_name(contents)
    adapters = {canonical(key) for key in contents.adapter_keys()}
    saved = {canonical(key) for key in record.saved}
    states = {
        entry: {canonical(key): value for key, value in checkpoint[entry].items()}
        for entry in STATES
        if entry in checkpoint
    }
    no_buffers = contents.parameters.keys() | contents.codes | adapters | saved
    others = {key for state in states.values() for key in state if key not in no_buffers}
    changed = {key for key in others for state in states.values() if key in state and _has_changed(key, state, record)}
    kept = adapters | saved | changed
    for entry, state in states.items():
        _check_complete(entry, state, adapters | saved)
        checkpoint[entry] = {key: value for key, value in state.items() if key in kept}
    checkpoint[MANIFEST] = {
        "format": FORMAT,
        "version": __version__,
        "configs": {name: config.to_dict() for name, config in record.configs.items()},
        "quantization": None if record.quantization is None else record.quantization.to_dict(),
        "quantized_from": quantized_from(module),
        "layers": {path: _settings_of(layer) for path, layer in layers.items()},
        "active": {path: list(layer.active) for path, layer in layers.items()},
        "adapters": sorted(adapters),
        "saved": sorted(saved),
        "buffers": sorted(changed),
        "base": fingerprint(contents.base(record)),
        "base_buffers": fingerprint({key: record.buffers[key] for key in sorted(others - changed)}),
    }


def _check_complete(entry: str, state: Mapping[str, Any], trained: set[str]) -> None:
    lost = sorted(trained - set(state))
    if lost:
        raise CheckpointError(
            f"{len(lost)} trained tensors are missing from checkpoint[{entry!r}], such as {lost[0]!r}. "
            "Something else filters the state dict (an on_save_checkpoint hook, a strategy); let it keep them."
        )
    for key, value in state.items():
        if not isinstance(value, Tensor) and not opens_safely(value):
            raise CheckpointError(
                f"{key!r} is of type {type(value).__name__}, which no checkpoint that opens safely (weights_only=True) "
                "can hold. Let get_extra_state() of that module return tensors and plain values."
            )


def complete_base(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Check an adapter-only checkpoint against ``module`` and fill in the base, in place, with the live tensors.

    Buffers that the file does not hold get the values that they had at the injection. The completed state then passes
    through ``load_state_dict(strict=True)`` of any strategy or callback.

    Raises:
        CheckpointError: If the checkpoint is not adapter-only, or its manifest can't be read.
        AdapterMismatchError: If adapter tensors are missing, unexpected, of other shapes, or scaled differently.
        BaseMismatchError: If the file was trained on another base.
    """
    record = _live_record(module)
    found = read_manifest(checkpoint)
    contents = survey(module)
    live = {canonical(key): (key, value) for key, value in module.state_dict().items()}
    trained = {canonical(key) for key in (*contents.adapter_keys(), *record.saved)}
    base = {canonical(key): value for key, value in base_buffers(module, record)}
    others = set(live) - set(contents.parameters) - contents.codes - trained
    wanted = trained | (others & {*found["buffers"]}) | (others - set(base))
    states = {
        entry: {canonical(key): value for key, value in checkpoint[entry].items()}
        for entry in STATES
        if entry in checkpoint
    }
    for state in states.values():
        _compare_tensors(state, live, wanted)
    layers = _by_first_name(contents)
    _compare_settings(found["layers"], {path: _settings_of(layer) for path, layer in layers.items()})
    _compare_quantization(found.get("quantization"), record)
    _refuse_other_base(describe_difference(found["base"], fingerprint(contents.base(record))), *_rounded(found, module))
    buffers = _buffers_then(found, {key: value for key, value in base.items() if key not in wanted}, record)
    for entry, state in states.items():
        checkpoint[entry] = {
            key: state[name] if name in state else buffers[name].clone() if name in buffers else value
            for name, (key, value) in live.items()
        }
    _restore_active(found["active"], layers)


def _buffers_then(found: Mapping[str, Any], live: Mapping[str, Tensor], record: Record) -> Mapping[str, Tensor]:
    """Values of the buffers that are not in the file because the run that saved it had not changed them."""
    noted = {key: record.buffers.get(key, value) for key, value in live.items()}
    difference = describe_difference(found["base_buffers"], fingerprint(noted), what="buffers")
    # Where the base was loaded after the injection, its buffers were, too.
    if difference is None or describe_difference(found["base_buffers"], fingerprint(live)) is not None:
        _refuse_other_base(difference)
        return noted
    return live


def _rounded(found: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Why codes may differ though the weights are the same."""
    then, now = found.get("quantized_from"), quantized_from(module)
    return [] if then in (None, now) else [f"it was quantized from {then}, and here from {now}"]


def _refuse_other_base(difference: str | None, *reasons: str) -> None:
    if difference is not None:
        difference = "; ".join((difference, *reasons))
        raise BaseMismatchError(
            f"The adapters in this checkpoint were trained on another base: {difference}. Build the module with the "
            "weights it had then (same pretrained model, same seed for anything initialised at random)."
        )


def _restore_active(found: Mapping[str, list[str]], layers: Mapping[str, AdaptedLayer]) -> None:
    """Let the adapters act that acted at the save, unless those of either side were disabled for the moment."""
    different = [path for path, layer in layers.items() if found[path] != list(layer.active)]
    if different and any(found.values()) and any(layer.active for layer in layers.values()):
        for path in different:
            layers[path].active = tuple(found[path])
            for name in layers[path].adapters:
                layers[path].adapter(name).requires_grad_(name in found[path])


def read_manifest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked to have the form that this version reads.

    Raises:
        CheckpointError: If there is none, or it is damaged, or of a newer format.
    """
    found = checkpoint.get(MANIFEST)
    if found is None:
        raise CheckpointError(
            "This checkpoint holds no lightning_lora adapters: it was saved without LoRACallback. To start from its "
            "weights, load them into the module first (load_from_checkpoint) and fit without ckpt_path."
        )
    number = found.get("format") if isinstance(found, Mapping) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise CheckpointError("The lightning_lora manifest in this checkpoint is damaged: it has no format number.")
    if number > FORMAT:
        raise CheckpointError(
            f"This checkpoint has format {number} (lightning_lora {found.get('version')}); this version "
            f"reads up to {FORMAT}. Upgrade lightning_lora."
        )
    broken = _broken_parts(found)
    if broken:
        raise CheckpointError(
            f"The lightning_lora manifest in this checkpoint is damaged: {', '.join(broken)}. Use another checkpoint."
        )
    return dict(found)


def _broken_parts(found: Mapping[str, Any]) -> list[str]:
    configs, changes = found.get("configs"), found.get("hyper_parameters", {})
    layers, active = found.get("layers"), found.get("active")
    right = {
        "configs": isinstance(configs, dict) and configs != {} and all(isinstance(c, dict) for c in configs.values()),
        "layers": isinstance(layers, dict) and all(isinstance(settings, dict) for settings in layers.values()),
        "active": not isinstance(layers, dict) or _are_of_layers(active, layers),
        **{key: _is_names(found.get(key)) for key in ("adapters", "saved", "buffers")},
        **{key: isinstance(found.get(key), dict) and is_fingerprint(found[key]) for key in ("base", "base_buffers")},
        "quantization": isinstance(found.get("quantization"), (dict, type(None))),
        "quantized_from": found.get("quantized_from") in (None, *COMPUTE_DTYPES, "float64"),
        "optimizers": _is_names(found.get("optimizers", [])),
        "hyper_parameters": isinstance(changes, dict) and all(_is_names(names) for names in changes.values()),
    }
    return [key for key, usable in right.items() if not usable]


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_of_layers(active: Any, layers: Mapping[str, Any]) -> bool:
    return (
        isinstance(active, dict)
        and active.keys() == layers.keys()
        and all(_is_names(names) and all(name in layers[path] for name in names) for path, names in active.items())
    )


def _has_changed(key: str, state: Mapping[str, Any], record: Record) -> bool:
    """Whether an entry that is no parameter belongs into the file: a counter, queue or metric state that moved."""
    return key not in record.buffers or is_extra_state(key) or not has_values_of(state[key], record.buffers[key])


def _live_record(module: nn.Module) -> Record:
    record = find_record(module)
    if record is None:
        raise AdapterMismatchError("The module has no adapters: call inject_adapters, or use LoRACallback.")
    if record.merged is not None:
        raise MergeError("The adapters of this module are merged. Call unmerge_adapters(module) first.")
    return record


def _by_first_name(contents: Contents) -> dict[str, AdaptedLayer]:
    first: dict[AdaptedLayer, str] = {}
    for prefix, layer in contents.layers.items():
        first.setdefault(layer, canonical(prefix.removesuffix(".")))
    return {path: layer for layer, path in first.items()}


def _settings_of(layer: AdaptedLayer) -> dict[str, list[float]]:
    """Adapter -> rank, alpha and scaling: what shapes alone don't tell."""
    adapters = {name: layer.adapter(name) for name in layer.adapters}
    return {name: [adapter.rank, adapter.alpha, adapter.scaling] for name, adapter in adapters.items()}


def _compare_tensors(
    state: Mapping[str, Tensor],
    live: Mapping[str, tuple[str, Tensor]],
    wanted: set[str],
) -> None:
    missing = sorted(wanted - set(state))
    unexpected = sorted(key for key in state if key not in live or key not in wanted)
    problems = []
    if missing:
        problems.append(f"missing from the file: {_some(missing)}")
    if unexpected:
        problems.append(f"in the file, but not trained by this configuration: {_some(unexpected)}")
    for key in sorted(key for key in state if key in live and not is_extra_state(key)):
        value, expected = _form(state[key]), _form(live[key][1])
        if value != expected:
            problems.append(f"{key} is {value} in the file and {expected} here")
    if problems:
        raise AdapterMismatchError(
            "The adapters in this checkpoint do not fit the module: "
            + "; ".join(problems[:4])
            + ". Use the configuration it was trained with (rank, target_modules, layers, modules_to_save)."
        )


def _form(value: Any) -> str:
    """What a tensor has to have in common with the one that it replaces; its precision may differ."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "complex " if value.is_complex() else "" if value.is_floating_point() else "integer "
    storage = "meta " if value.is_meta else "" if value.layout == torch.strided else f"{value.layout} "
    return f"{storage}{kind}{tuple(value.shape)}"


def _compare_settings(found: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    different = [layer for layer in live if found.get(layer) != live[layer]]
    if different:
        layer = different[0]
        raise AdapterMismatchError(
            f"[rank, alpha, scaling] of {len(different)} layers differ, such as {layer}: {found.get(layer)} in the "
            f"file and {live[layer]} here. Use the alpha, rank and rank_stabilized it was trained with."
        )


def _compare_quantization(found: Mapping[str, Any] | None, record: Record) -> None:
    live = None if record.quantization is None else record.quantization.to_dict()
    # In what dtype the products run is no part of the base; a field that a file does not know was at its default.
    defaults = QuantizationConfig().to_dict()
    formats = [None if form is None else {**defaults, **form, "compute_dtype": None} for form in (found, live)]
    if formats[0] != formats[1]:
        names = [
            "a dense base" if form is None else f"a base quantized with {_differing(form, other)}"
            for form, other in (formats, formats[::-1])
        ]
        raise BaseMismatchError(
            f"The adapters in this checkpoint were trained on {names[0]}, and here is {names[1]}: they would correct "
            "errors that this base does not have. Use the same quantization=QuantizationConfig(...), or none."
        )


def _differing(form: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    shown = {key: value for key, value in form.items() if other is None or other.get(key) != value}
    return ", ".join(f"{key}={value!r}" for key, value in shown.items() if value not in (None, []))


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
