"""Adapter-only checkpoints: keep what was trained, note what it was trained on, and load it back strictly.

Works on the plain dict that Lightning saves and loads; Lightning itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.checkpoint_file import MANIFEST
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, CheckpointError, MergeError
from lightning_lora.fingerprint import base_fingerprint, describe_difference, is_fingerprint
from lightning_lora.injection import base_buffers, checksum
from lightning_lora.layers import AdaptedLayer, adapted_layers
from lightning_lora.record import Record, find_record
from lightning_lora.targets.patterns import canonical
from lightning_lora.version import __version__

FORMAT = 1
# WeightAveraging keeps the averaged state under "state_dict" and the live one under the second key.
STATES = ("state_dict", "current_model_state")


def adapter_keys(module: nn.Module) -> set[str]:
    """State-dict keys of all adapter tensors of ``module``, under every name of a shared layer."""
    return {
        f"{name}.{key}"
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, Adapter)
        for key in child.state_dict()
    }


def strip_base(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Make a checkpoint adapter-only, in place, and add the manifest.

    Args:
        module: The module with live adapters whose state the checkpoint holds.
        checkpoint: What Lightning is about to save.

    Raises:
        CheckpointError: If an adapter tensor is missing from the state, so that the file would be useless.
    """
    record = _live_record(module)
    adapters = {canonical(key) for key in adapter_keys(module)}
    saved = {canonical(key) for key in record.saved}
    buffers: set[str] = set()
    for entry in STATES:
        if entry in checkpoint:
            state = {canonical(key): value for key, value in checkpoint[entry].items()}
            buffers |= changed_buffers(module, record, state) - saved
            lost = sorted((adapters | saved) - set(state))
            if lost:
                raise CheckpointError(
                    f"{len(lost)} trained tensors are missing from checkpoint[{entry!r}], such as {lost[0]!r}. "
                    "Something else filters the state dict (an on_save_checkpoint hook, a strategy); let it keep them."
                )
            kept = adapters | saved | buffers
            checkpoint[entry] = {key: value for key, value in state.items() if key in kept}
    checkpoint[MANIFEST] = manifest(module, record, adapters=adapters, saved=saved, buffers=buffers)


def manifest(
    module: nn.Module,
    record: Record,
    *,
    adapters: Iterable[str],
    saved: Iterable[str],
    buffers: Iterable[str],
) -> dict[str, Any]:
    """What a reader has to know of the tensors in a file, in plain types."""
    return {
        "format": FORMAT,
        "version": __version__,
        "configs": {name: config.to_dict() for name, config in record.configs.items()},
        "layers": _layer_settings(module),
        "adapters": sorted(adapters),
        "saved": sorted(saved),
        "buffers": sorted(buffers),
        "base": base_fingerprint(module, record),
    }


def complete_base(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Check an adapter-only checkpoint against ``module`` and fill in the base, in place, with the live tensors.

    The completed state then passes through ``load_state_dict(strict=True)`` of any strategy or callback.

    Raises:
        CheckpointError: If the checkpoint is not adapter-only, or its manifest can't be read.
        AdapterMismatchError: If adapter tensors are missing, unexpected, of other shapes, or scaled differently.
        BaseMismatchError: If the file was trained on another base.
    """
    record = _live_record(module)
    found = read_manifest(checkpoint)
    live = {canonical(key): (key, value) for key, value in module.state_dict().items()}
    wanted = {canonical(key) for key in (*adapter_keys(module), *record.saved)}
    base = {canonical(key) for key, _ in base_buffers(module, record)}
    for entry in STATES:
        if entry in checkpoint:
            state = {canonical(key): value for key, value in checkpoint[entry].items()}
            _compare_tensors(state, live, wanted, base.intersection(found["buffers"]))
            checkpoint[entry] = {key: state.get(name, value) for name, (key, value) in live.items()}
    _compare_settings(found["layers"], _layer_settings(module))
    difference = describe_difference(found["base"], base_fingerprint(module, record))
    if difference is not None:
        raise BaseMismatchError(
            f"The adapters in this checkpoint were trained on another base: {difference}. Build the module with the "
            "weights it had then (same pretrained model, same seed for anything initialised at random)."
        )


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
    right = {
        "configs": isinstance(configs, dict) and configs != {} and all(isinstance(c, dict) for c in configs.values()),
        "layers": isinstance(found.get("layers"), dict),
        **{key: _is_names(found.get(key)) for key in ("adapters", "saved", "buffers")},
        "base": isinstance(found.get("base"), dict) and is_fingerprint(found["base"]),
        "optimizers": _is_names(found.get("optimizers", [])),
        "hyper_parameters": isinstance(changes, dict) and all(_is_names(names) for names in changes.values()),
    }
    return [key for key, usable in right.items() if not usable]


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def changed_buffers(module: nn.Module, record: Record, state: Mapping[str, Any]) -> set[str]:
    """Names in ``state`` of persistent buffers that changed since the injection (counters, queues, metric states)."""
    known = {canonical(key) for key, _ in module.named_parameters(remove_duplicate=False)}
    return {
        key
        for key, value in state.items()
        if key not in known and isinstance(value, Tensor) and record.buffers.get(key) != checksum(value)
    }


def _live_record(module: nn.Module) -> Record:
    record = find_record(module)
    if record is None:
        raise AdapterMismatchError("The module has no adapters: call inject_adapters, or use LoRACallback.")
    if record.merged is not None:
        raise MergeError("The adapters of this module are merged. Call unmerge_adapters(module) first.")
    return record


def _layer_settings(module: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Layer -> adapter -> rank, alpha and scaling: what shapes alone don't tell."""
    return {
        canonical(path): {name: _settings_of(layer, name) for name in layer.adapters}
        for path, layer in adapted_layers(module)
    }


def _settings_of(layer: AdaptedLayer, name: str) -> list[float]:
    adapter = layer.adapter(name)
    return [adapter.rank, adapter.alpha, adapter.scaling]


def _compare_tensors(
    state: Mapping[str, Tensor],
    live: Mapping[str, tuple[str, Tensor]],
    wanted: set[str],
    welcome: set[str],
) -> None:
    missing = sorted(wanted - set(state))
    unexpected = sorted(key for key in state if key not in live or key not in wanted | welcome)
    problems = []
    if missing:
        problems.append(f"missing from the file: {_some(missing)}")
    if unexpected:
        problems.append(f"in the file, but not trained by this configuration: {_some(unexpected)}")
    for key in sorted(set(state) & set(live)):
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


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
