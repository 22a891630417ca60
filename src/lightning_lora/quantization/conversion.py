"""Turn linear layers into quantized ones, in place: the layer object, its name and its bias stay."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import MissingDependencyError, QuantizationError
from lightning_lora.quantization import sixteen_bit
from lightning_lora.quantization.config import COMPUTE_DTYPES, STORAGE_DTYPES, QuantizationConfig
from lightning_lora.quantized_layer import QuantizedLayer

_FOREIGN = "_lightning_lora_was"  # on a layer of bitsandbytes: its class and the attributes that were taken off it
_SETTINGS = ("dense_dtype", "compute_dtype", "stored_as", "quantized_from", "was_trainable")


def quantize_layers(
    module: nn.Module, names: Iterable[str], config: QuantizationConfig, *, device: torch.device | None = None
) -> None:
    """Quantize the ``nn.Linear`` layers called ``names``, one after the other: of one at a time both forms exist.

    Args:
        module: Holds the layers.
        names: Dotted names.
        config: The format.
        device: Where to quantize, and where the codes stay; None: where the weight is. A GPU is 100 times faster.

    Raises:
        QuantizationError: If a weight has no values, or values that are not finite; nothing is changed then.
        MissingDependencyError: If bitsandbytes is not installed.
    """
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():
        why = _unfit(layer.weight)
        if why is not None:
            raise QuantizationError(
                f"{name!r} can't be quantized: {why}. Load its weights first (base_weights=... streams them in), or "
                "name the layer in QuantizationConfig.skip_modules."
            )
    for layer in layers.values():
        quantize_layer(layer, layer.weight.data, config, device=device)


def _unfit(weight: Tensor) -> str | None:
    if weight.is_meta:
        return "its weight has no values (it is on the meta device)"
    extremes = torch.stack(torch.aminmax(weight.detach())).float()  # codes have scales in fp32
    return None if torch.isfinite(extremes).all() else "its weight holds values that are not finite"


def quantize_layer(
    layer: nn.Module, weight: Tensor, config: QuantizationConfig, *, device: torch.device | None = None
) -> None:
    """Make an ``nn.Linear`` a quantized layer with the codes of ``weight``, ``(out_features, in_features)``.

    Raises:
        QuantizationError: If the weight has values that are not finite.
        MissingDependencyError: If bitsandbytes is not installed.
    """
    require_bitsandbytes(config)
    weight = weight.to(device or weight.device)
    codes: Tensor
    cls: type[QuantizedLayer]
    if config.quant_type == "int8":
        from lightning_lora.quantization import eight_bit

        codes, cls = eight_bit.quantize(weight), eight_bit.QuantizedLinear8bit
    elif config.quant_type == "bf16":
        codes, cls = sixteen_bit.quantize(weight), sixteen_bit.QuantizedLinear16bit
    else:
        from lightning_lora.quantization import four_bit

        settings = {
            "blocksize": config.block_size,
            "compress_statistics": config.double_quant,
            "quant_type": config.quant_type,
            "quant_storage": STORAGE_DTYPES[config.storage_dtype],
        }
        codes = four_bit.quantize(weight, settings, clip_search=config.clip_search)
        cls = four_bit.QuantizedLinear4bit
    compute_dtype = None if config.compute_dtype is None else COMPUTE_DTYPES[config.compute_dtype]
    was_trainable = layer.weight.requires_grad
    layer.weight.requires_grad_(False)  # an optimizer may hold it: one without gradients is taken out there
    become_quantized(
        layer,
        cls,
        codes,
        dense_dtype=weight.dtype,
        compute_dtype=compute_dtype,
        stored_as=config,
        quantized_from=weight.dtype,
        was_trainable=was_trainable,
    )


def become_quantized(layer: nn.Module, cls: type[QuantizedLayer], codes: Tensor, **settings: Any) -> None:
    """Give a linear layer a class of quantized layers, codes for its weight, and the settings of that class."""
    layer.__class__ = cls
    layer.weight = codes
    layer.__dict__.update(settings)


def become_dense(layer: nn.Module, weight: nn.Parameter) -> tuple[type[QuantizedLayer], Tensor, dict[str, Any]]:
    """Make a quantized layer a plain ``nn.Linear`` with ``weight``; returns what :func:`become_quantized` needs."""
    assert isinstance(layer, QuantizedLayer)
    settings = settings_of(layer)
    for key in settings:
        del layer.__dict__[key]
    codes, cls = layer.weight, type(layer)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    layer.weight = weight
    return cls, codes, settings


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """What :func:`become_quantized` was given beside class and codes."""
    return {key: vars(layer)[key] for key in (*_SETTINGS, _FOREIGN) if key in vars(layer)}


def adopt_foreign(module: nn.Module) -> None:
    """Make every layer of bitsandbytes in ``module`` one that never rewrites itself, with the same codes.

    Raises:
        QuantizationError: If an evaluation has repacked a layer's codes for another kernel: they are of no use now; or
            if a layer's forward is not that of bitsandbytes.
    """
    kinds = {name: kind for name, child in module.named_modules() if (kind := foreign_kind(child)) is not None}
    beside = _dtype_beside(module) if "Linear8bitLt" in kinds.values() else torch.float16
    for name, kind in kinds.items():
        _adopt(name, module.get_submodule(name), kind, beside=beside)


def release_foreign(module: nn.Module) -> None:
    """Give the layers that :func:`adopt_foreign` changed their own class back."""
    child: Any
    for child in module.modules():
        was = child.__dict__.pop(_FOREIGN, None)
        if was is None:
            continue
        cls, attributes = was
        if "state" in attributes:  # bitsandbytes moves them there in the next forward
            attributes["state"].CB, attributes["state"].SCB = None, None
        else:
            attributes["quant_state"], child.weight.module = child.weight.quant_state, child
        for key in _SETTINGS:
            child.__dict__.pop(key, None)
        child.__class__ = cls
        child.__dict__.update(attributes)


def foreign_kind(module: nn.Module) -> str | None:
    """``"Linear4bit"`` or ``"Linear8bitLt"`` for a layer of bitsandbytes with frozen codes, else None.

    bitsandbytes is not imported to recognise its classes.
    """
    if isinstance(module, QuantizedLayer):
        return None
    for cls in type(module).__mro__:
        if cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ in ("Linear4bit", "Linear8bitLt"):
            return None if getattr(module.weight, "has_fp16_weights", False) else cls.__name__
    return None


def _dtype_beside(module: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter of the module that is no code: 8-bit codes don't tell what they were."""
    codes = {id(child.weight) for child in module.modules() if foreign_kind(child) or isinstance(child, QuantizedLayer)}
    found = (p.dtype for p in module.parameters() if id(p) not in codes and p.is_floating_point())
    return next(found, torch.float16)


def _adopt(name: str, layer: Any, kind: str, *, beside: torch.dtype) -> None:
    codes: Any
    cls: type[QuantizedLayer]
    _refuse_own_forward(name, layer, kind)
    if kind == "Linear4bit":
        from lightning_lora.quantization import four_bit

        _refuse_repacked(name, layer)
        keys = ("quant_state", "compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")
        was = type(layer), {key: layer.__dict__.pop(key) for key in keys if key in vars(layer)}
        # What an evaluation on some CPUs asks before it repacks the codes: also off once the layer is released.
        was[1]["support_avx512bf16_for_cpu"] = False
        codes = four_bit.adopt(layer.weight)
        compute_dtype = was[1].get("compute_dtype") if was[1].get("compute_type_is_set") else None
        dense_dtype, cls = codes.quant_state.dtype, four_bit.QuantizedLinear4bit
    else:
        from lightning_lora.quantization import eight_bit

        state = layer.__dict__.pop("state")
        was = type(layer), {"state": state}
        codes = eight_bit.adopt(layer.weight, state)
        dense_dtype = beside if layer.bias is None else layer.bias.dtype
        compute_dtype, cls = None, eight_bit.QuantizedLinear8bit
    become_quantized(layer, cls, codes, dense_dtype=dense_dtype, compute_dtype=compute_dtype, **{_FOREIGN: was})


def _refuse_own_forward(name: str, layer: nn.Module, kind: str) -> None:
    definer = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    if getattr(vars(layer).get("forward"), "__func__", None) is vars(definer)["forward"]:
        del layer.__dict__["forward"]  # accelerate leaves it when it takes its hook off
    if "forward" in vars(layer) or definer.__module__ != "bitsandbytes.nn.modules":
        raise QuantizationError(
            f"{name!r} is a {kind} of bitsandbytes with a forward of its own (a subclass, or a hook of accelerate), "
            "which an adapter can't replace. Load the model onto one device (device_map={'': 0}), or take the hooks "
            "off with accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )


def _refuse_repacked(name: str, layer: nn.Module) -> None:
    # False where a state_dict() has put the codes back, whose scales are rounded or in another order since.
    if hasattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu"):
        raise QuantizationError(
            f"{name!r} was evaluated before, and bitsandbytes repacked its 4-bit weight for that, in a form that can't "
            "be trained or merged. Load the model anew and evaluate it with lightning_lora, or set "
            "layer.support_avx512bf16_for_cpu = False on every Linear4bit before its first forward."
        )


def require_bitsandbytes(config: QuantizationConfig) -> None:
    """Import bitsandbytes if a format needs it, or say what to install.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    if config.quant_type == "bf16":
        return
    # It warns that a kernel of the hub would make its own evaluation on a CPU faster, which nothing here uses.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"A quantized base needs bitsandbytes ({error}): pip install 'lightning-lora[qlora]'"
        ) from error
    finally:
        logger.disabled = was_disabled
