"""Fold adapters into the base, in fp32, with proof; and take them out again exactly.

An unmerge by subtraction is not exact (4 % of fp32 elements and more of bf16 ones change), so the replaced weights are
kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from lightning_lora.dense_models import declare_dense
from lightning_lora.errors import MergeError
from lightning_lora.frozen import keep_base_as_is
from lightning_lora.injection import thaw
from lightning_lora.kept_weights import put_back, replace_weight, snapshot
from lightning_lora.layers import AdaptedLayer, adapted_layers, detach_adapters, note_siblings, reattach_adapters
from lightning_lora.merging.changes import base_sums, changed_since_merge, weight_of
from lightning_lora.merging.config import MergeConfig
from lightning_lora.merging.for_good import merge_for_good
from lightning_lora.merging.proof import judge, live_record, plain_weights, proved_weights
from lightning_lora.merging.report import MergeReport, Norms
from lightning_lora.record import MergedState, Record, find_record
from lightning_lora.targets.patterns import canonical


def merge_adapters(module: nn.Module, config: MergeConfig | None = None) -> MergeReport:
    """Fold the active adapters into the base weights, in place: original classes and keys, one dense weight per layer.

    The sum is taken in fp32 and rounded once to the weight's dtype. The replaced weights are kept on the module, so
    that :func:`unmerge_adapters` is exact, unless the config says otherwise.

    Args:
        module: A module with adapters.
        config: Its ``base``, ``original``, ``keep_base`` and ``tolerance`` apply; the rest concerns the artifact of
            the callback.

    Returns:
        Per layer, the size of the update and the error that rounding adds, relative to it.

    Raises:
        MergeError: If the result would not be right; nothing is changed then.
    """
    record = live_record(module)
    config = dataclasses.replace(config or MergeConfig(), dtype=None)
    if not config.keep_base:
        return merge_for_good(module, record, config)
    merged, norms = MergedState(), Norms()
    assert merged.weights is not None
    try:
        for weight in proved_weights(module, config, norms):
            merged.active[weight.name] = weight.layer.active
            merged.adapters[weight.name] = detach_adapters(weight.layer)
            merged.weights[weight.name] = weight.put_in()
        report = judge(norms, config)
        if config.base != "requantized":
            for name, plain, dense in plain_weights(module, config):
                merged.weights[name] = replace_weight(plain, dense)
        merged.sums = base_sums(module, record)
        if config.base != "requantized" and any(kept.quantized for kept in merged.weights.values()):
            merged.redeclare = declare_dense(module)
    except BaseException:
        _take_back(module, merged)
        raise
    record.merged = merged
    thaw(module, record)
    return report


def unmerge_adapters(module: nn.Module) -> None:
    """Undo :func:`merge_adapters` exactly: the base weights bit by bit, and live adapters.

    Raises:
        MergeError: If the module is not merged, or has no way back, as a copy of a merged module and one that was
            merged with ``keep_base=False``, or if a merged weight was trained, loaded or edited since: unmerging would
            throw that away.
    """
    record = find_record(module)
    if record is None or record.merged is None:
        raise MergeError("The module is not merged.")
    if record.merged.weights is None:
        raise MergeError(
            "This module was merged with keep_base=False, or is a copy of a merged one and has no base weights to go "
            "back to. Build the module anew, or call remove_adapters(module) to take its merged weights as a new base."
        )
    changed = changed_since_merge(module)
    layers = [name for name in record.merged.weights if weight_of(name) in changed]
    if layers:
        raise MergeError(
            f"The weight of {layers[0]!r} is not the merged one any more: it was trained, loaded or edited after the "
            "merge, and unmerging would throw that away. Call remove_adapters(module) to take the module's weights as "
            "the new base, or build the module anew."
        )
    _unfold(module, record, record.merged)


def unmerge_for_now(module: nn.Module) -> Callable[[], None]:
    """:func:`unmerge_adapters`, and a function that merges again: every bit, flag and gradient is as before then."""
    record = find_record(module)
    merged = None if record is None else record.merged
    weights = {} if merged is None or merged.weights is None else merged.weights
    layers = {canonical(name): child for name, child in module.named_modules()}
    stored = {name: snapshot(layers[canonical(name)]) for name in weights if canonical(name) in layers}
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    declared = merged is not None and merged.redeclare is not None
    unmerge_adapters(module)

    def merge_again() -> None:
        assert record is not None
        if merged is not None and declared:
            merged.redeclare = declare_dense(module)
        for name, restore in stored.items():
            layer = layers[canonical(name)]
            if isinstance(layer, AdaptedLayer):
                detach_adapters(layer)
            restore()
        thaw(module, record)
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        record.merged = merged

    return merge_again


def _take_back(module: nn.Module, merged: MergedState) -> None:
    """Make the layers that a merge has reached what they were before it."""
    assert merged.weights is not None
    layers = {canonical(name): child for name, child in module.named_modules()}
    for name, kept in merged.weights.items():
        put_back(layers[canonical(name)], kept)
    for name, adapters in merged.adapters.items():
        reattach_adapters(layers[canonical(name)], adapters, merged.active[name])
    note_siblings(module)


def _unfold(module: nn.Module, record: Record, merged: MergedState) -> None:
    _take_back(module, merged)
    for _, layer in adapted_layers(module):  # which may have moved or changed its mode while it was plain
        layer.adapters.to(layer.weight.device).train(layer.training)
    if merged.redeclare is not None:
        merged.redeclare()
        merged.redeclare = None
    record.merged = None
    _freeze_again(module, record)


def is_merged(module: nn.Module) -> bool:
    """Whether the adapters of ``module`` are merged into its base."""
    record = find_record(module)
    return record is not None and record.merged is not None


def _freeze_again(module: nn.Module, record: Record) -> None:
    for key, parameter in module.named_parameters():
        if canonical(key) in record.was_trainable:
            parameter.requires_grad_(False)
            parameter.grad = None
        elif canonical(key) in record.was_frozen:
            parameter.requires_grad_(True)
    keep_base_as_is(module, saved=record.saved)
