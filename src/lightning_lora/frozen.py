"""Keep a frozen base as it is: norm statistics that don't move, a forward that goes through the layers, and cheaply."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from lightning_lora.class_swap import SwappedClass, restore_class, swap_class
from lightning_lora.frozen_layer import FrozenLayer, is_linear, leave_frozen
from lightning_lora.fused import is_emulated
from lightning_lora.layers import AdaptedLayer
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.targets.patterns import canonical

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class FrozenStatistics(SwappedClass):
    """Mixin of a norm layer whose running statistics are part of the frozen base: it never enters train mode.

    In train mode BatchNorm rewrites its running statistics at every forward, frozen parameters or not; an
    adapter-only checkpoint would then be evaluated with other statistics than the run was.
    """

    class_prefix = "Frozen"

    @override
    def train(self: ModuleT, mode: bool = True) -> ModuleT:
        return super().train(False)


class WithoutFastPath(SwappedClass):
    """Mixin of ``nn.TransformerEncoder(Layer)`` that computes with its layers, in evaluation too.

    In eval mode these classes read the weights of their linear layers and call one fused kernel, so that validation
    would silently see the base model without its adapters. Each looks at one of these attributes first, which tell it
    that it is of a kind that the kernel can't compute; torch's global switch can't be set inside a compiled forward.
    """

    class_prefix = "Layerwise"

    @property
    def activation_relu_or_gelu(self) -> int:
        """Of the layer: its activation is one that the kernel does not know."""
        return 0

    @property
    def use_nested_tensor(self) -> bool:
        """Of the encoder: it does not pass nested tensors, which only the kernel takes, to its layers."""
        return False


_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def keep_base_as_is(root: nn.Module, *, saved: Collection[str] = ()) -> list[str]:
    """Swap the frozen norm and linear layers, and the encoders with adapted layers; safe to call again.

    Args:
        root: The module, frozen, with its adapters.
        saved: Names of parameters and buffers that are trained on purpose: their norm layers are left alone.

    Returns:
        Dotted names of all norm layers whose statistics are kept.
    """
    kept: list[str] = []
    holders = _holders(root)
    for name, child in list(root.named_modules()):
        if isinstance(child, FrozenStatistics):
            kept.append(name)
        elif _tracks_statistics(child) and canonical(f"{name}.running_mean") not in saved:
            # What holds it is put in another mode meanwhile, and the norm would have been with it.
            follows = child in holders and holders[child].training == child.training
            own_mode = None if follows else child.training
            swap_class(child, FrozenStatistics)
            child.__dict__["_lightning_lora_mode"] = own_mode
            child.training = False
            kept.append(name)
        elif isinstance(child, _FAST_PATHS) and not isinstance(child, SwappedClass) and _is_changed(child):
            swap_class(child, WithoutFastPath)
        elif _gains(child):
            swap_class(child, FrozenLayer)
    _choose_kept_casts(root)
    return kept


def release_base(root: nn.Module) -> None:
    """Undo :func:`keep_base_as_is`."""
    holders = _holders(root)
    for child in list(root.modules()):
        if isinstance(child, FrozenStatistics):
            own_mode = child.__dict__.pop("_lightning_lora_mode")
            child.training = holders[child].training if own_mode is None else own_mode
            restore_class(child)
        elif isinstance(child, WithoutFastPath):
            restore_class(child)
        else:
            leave_frozen(child)


def _tracks_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats and not isinstance(module, SwappedClass)


def _gains(module: nn.Module) -> bool:
    """Whether this is a frozen linear layer whose weight autocast would cast, or whose products this CPU can't take."""
    if isinstance(module, SwappedClass | LazyModuleMixin) or not is_linear(type(module)) or is_parametrized(module):
        return False
    weight = module._parameters.get("weight")
    frozen = not any(parameter.requires_grad for parameter in module.parameters())
    if not frozen or weight is None or not weight.numel():
        return False
    return weight.dtype == torch.float32 or is_emulated(weight.dtype)


def _choose_kept_casts(root: nn.Module) -> None:
    """No cast is kept of what comes behind the last adapter, as a head does.

    A step needs that for a moment between its two passes: kept, it would be there while blocks are recomputed.
    """
    layers = [child for child in root.modules() if isinstance(child, FrozenLayer)]
    last = max((index for index, layer in enumerate(layers) if isinstance(layer, AdaptedLayer)), default=-1)
    for index, layer in enumerate(layers):
        if not isinstance(layer, AdaptedLayer):
            layer.keeps_cast = index < last


def _holders(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that holds each module inside ``root``."""
    return {child: holder for holder in root.modules() for child in holder.children()}


def _is_changed(module: nn.Module) -> bool:
    return any(isinstance(child, (AdaptedLayer, QuantizedLayer)) for child in module.modules())
