"""Choose the linear layers of a base that are stored in fewer bits, and store them so."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Set

import torch
from torch import nn

from lightning_lora.class_swap import original_class
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import QuantizationError, TargetNotFoundError
from lightning_lora.fresh import is_pretrained_model
from lightning_lora.frozen_layer import leave_frozen
from lightning_lora.layers import AdaptedLayer
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.conversion import quantize_layer, quantize_layers, require_bitsandbytes
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import Record
from lightning_lora.streaming import stream_weights
from lightning_lora.targets import Pattern, select_targets
from lightning_lora.targets.patterns import canonical
from lightning_lora.targets.selection import Selection
from lightning_lora.weight_files import WeightFiles


def quantize_base(
    module: nn.Module,
    record: Record,
    config: AdapterConfig,
    quantization: QuantizationConfig,
    *,
    saved: Set[str],
    strict: bool,
    device: torch.device | None = None,
    files: WeightFiles | None = None,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Quantize the frozen linear layers of ``module`` that are dense, and note it in ``record``.

    Args:
        module: Any module, before its layers get adapters.
        record: Its record.
        config: What is adapted.
        quantization: The format.
        saved: Names of modules that are trained in full.
        strict: False leaves weights without values, and patterns that match nothing, for later.
        files: What tensors without values are filled from; the layers to quantize never exist dense then.
        device: Where to quantize, as in :func:`~lightning_lora.quantization.conversion.quantize_layers`.
        rounded_to: Dtype that the weights are cast to before; None: their own.

    Raises:
        QuantizationError: If no layer can be quantized, or a weight has no values or values that are not finite.
        MissingDependencyError: If bitsandbytes is not installed.
        TargetNotFoundError: If a pattern of ``skip_modules`` matches nothing.
        ValueError: If the base was quantized in another format, or has adapters already.
    """
    _check(module, record, quantization)
    require_bitsandbytes(quantization)
    if strict:
        _refuse_idle_patterns(module, quantization)
    selection = layers_to_quantize(module, config, quantization, saved)
    names = [target.name for target in selection.targets]
    if not strict:
        names = [name for name in names if not module.get_submodule(name).weight.is_meta]
    if strict and not names and not any(isinstance(child, QuantizedLayer) for child in module.modules()):
        raise QuantizationError(
            f"No linear layer of {type(module).__name__} can be stored as {quantization.quant_type}: "
            + ("; ".join(f"{name!r}: {why}" for name, why in list(selection.skipped.items())[:3]) or "it has none")
        )
    for name in names:
        leave_frozen(module.get_submodule(name))
    for weight in [module.get_submodule(name).weight for name in names if rounded_to is not None]:
        weight.data = weight.data.to(rounded_to)
    if files is not None:
        quantize = functools.partial(quantize_layer, config=quantization, device=device)
        stream_weights(module, files, quantize=quantize, names=names)
        names = [name for name in names if not isinstance(module.get_submodule(name), QuantizedLayer)]
    quantize_layers(module, names, quantization, device=device)
    if strict and not any(getattr(child, "stored_as", None) == quantization for child in module.modules()):
        kinds = {child.describe() for child in module.modules() if isinstance(child, QuantizedLayer)}
        raise QuantizationError(
            f"All linear layers of {type(module).__name__} are stored as {', '.join(sorted(kinds))} already. Leave "
            "quantization=... out, or build the module with dense weights."
        )
    record.quantization = quantization


def check_codes(module: nn.Module) -> None:
    """Refuse codes that somebody wrote numbers over: 8-bit codes have the shape of the weight that they stand for.

    Raises:
        QuantizationError: With the name of the layer.
    """
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer) and not child.is_intact():
            raise QuantizationError(
                f"The {child.describe()} codes of {name!r} were written over in place (weight.data.copy_(...)). Load "
                "weights with load_state_dict, which quantizes them, or before the injection."
            )


def note_format(module: nn.Module, record: Record) -> None:
    """Note how this package quantized layers of ``module``, also in an injection that was removed since."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer) and child.stored_as is not None:
            record.quantization = child.stored_as
            if child.was_trainable:
                record.was_trainable.add(canonical(f"{name}.weight".lstrip(".")))


def quantized_from(module: nn.Module) -> str | None:
    """Dtype of the weights that this package quantized, which decides about the codes; None if there was not one."""
    layers = [child for child in module.modules() if isinstance(child, QuantizedLayer)]
    found = {str(layer.quantized_from).removeprefix("torch.") for layer in layers if layer.quantized_from is not None}
    return found.pop() if len(found) == 1 else None


def describe_quantized(module: nn.Module) -> Iterator[str]:
    """Lines on the quantized layers of ``module``: how many, in what format, and their bytes."""
    by_format: dict[str, list[QuantizedLayer]] = {}
    for child in module.modules():
        if isinstance(child, QuantizedLayer):
            by_format.setdefault(child.describe(), []).append(child)
    for form, layers in by_format.items():
        stored = sum(t.nbytes for layer in layers for t in (layer.weight, *layer.constants().values()))
        dense = sum(layer.in_features * layer.out_features * layer.dense_dtype.itemsize for layer in layers)
        yield f"{len(layers)} linear layers stored as {form}: {stored / 1e6:,.1f} MB instead of {dense / 1e6:,.1f} MB"


def _check(module: nn.Module, record: Record, quantization: QuantizationConfig) -> None:
    stored = (child.stored_as for child in module.modules() if isinstance(child, QuantizedLayer))
    for found in {record.quantization, *stored} - {None, quantization}:
        raise ValueError(f"The base is quantized already, with {found}; another format needs a new module.")
    if record.configs and record.quantization is None:
        raise ValueError(
            "The layers have adapters already: quantize with the first injection, or build the module anew."
        )


def layers_to_quantize(
    module: nn.Module, config: AdapterConfig, quantization: QuantizationConfig, saved: Set[str]
) -> Selection:
    """The frozen linear layers of ``module`` that are to be stored in fewer bits, and why others are not.

    Args:
        module: Any module, before its layers get adapters.
        config: What is adapted.
        quantization: Its ``skip_modules`` apply.
        saved: Names of modules that are trained in full.
    """
    everything = dataclasses.replace(
        config,
        target_modules="all-linear",
        exclude_modules=quantization.skip_modules,
        layers=None,
        rank_pattern={},
        alpha_pattern={},
    )
    selection = select_targets(module, everything, saved=frozenset(saved), strict=False)
    wide = _kept_wide(module)
    kept = []
    for target in selection.targets:
        layer = module.get_submodule(target.name)
        if target.name in wide:
            selection.skipped[target.name] = "transformers keeps it in fp32"
        elif _is_plain(layer) and layer.get_parameter("weight").numel():
            kept.append(target)
        elif not isinstance(layer, QuantizedLayer):
            selection.skipped[target.name] = f"{type(layer).__name__} is no plain nn.Linear"
    selection.targets = kept
    return selection


def _is_plain(layer: nn.Module) -> bool:
    return original_class(layer) is nn.Linear and not isinstance(layer, AdaptedLayer)


def _kept_wide(module: nn.Module) -> set[str]:
    """Layers that a transformers model says must stay in fp32: T5 casts its input to the dtype of such a weight."""
    found: set[str] = set()
    for name, child in module.named_modules():
        if is_pretrained_model(child):
            parts = {*(getattr(child, "_keep_in_fp32_modules", None) or ())}
            parts |= {*(getattr(child, "_keep_in_fp32_modules_strict", None) or ())}
            found |= {
                f"{name}.{path}".lstrip(".")
                for path, _ in child.named_modules()
                if any(f".{part}." in f".{path}.weight." for part in parts)
            }
    return found


def _refuse_idle_patterns(module: nn.Module, quantization: QuantizationConfig) -> None:
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for text in quantization.skip_modules:
        pattern = Pattern(text)
        if not any(pattern.matches(name) for name in names):
            nearest = ", ".join(map(repr, pattern.nearest(names)))
            raise TargetNotFoundError(f"skip_modules: {text!r} matches no module. Closest: {nearest}.")
