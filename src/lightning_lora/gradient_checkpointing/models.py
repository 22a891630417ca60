"""What models do of their own that would get in the way: their own switch, and a cache that training has no use for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_lora.fresh import is_pretrained_model

# transformers, diffusers and others; timm.
_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")
_REMEMBERED = "_lightning_lora_own_gradient_checkpointing"


def turn_off_own(module: nn.Module) -> int:
    """Turn off the gradient checkpointing that models inside ``module`` have of their own; returns how many had it."""
    count = 0
    for child in module.modules():
        switches = [name for name in _SWITCHES if child.__dict__.get(name) is True]
        if switches:
            child.__dict__[_REMEMBERED] = switches
            child.__dict__.update(dict.fromkeys(switches, False))
            count += 1
    return count


def give_back_own(module: nn.Module) -> None:
    """Undo :func:`turn_off_own`."""
    for child in module.modules():
        child.__dict__.update(dict.fromkeys(child.__dict__.pop(_REMEMBERED, ()), True))


def skip_caches(module: nn.Module, blocks: Iterable[nn.Module]) -> list[str]:
    """Let transformers models around ``blocks`` make no key-value cache in a training step unless it asks for one.

    ``config.use_cache`` is True by default, so that each training step fills a cache that holds on to the keys and
    values of all blocks; calls without gradients keep it.

    Returns:
        Dotted names of the models.
    """
    wanted = {id(block) for block in blocks}
    models = []
    for name, child in module.named_modules():
        names = _parameters(child) if is_pretrained_model(child) else ()
        if "use_cache" in names and any(id(part) in wanted for part in child.modules()):
            child.register_forward_pre_hook(functools.partial(_without_cache, names), with_kwargs=True)
            models.append(name)
    return models


def unskip_caches(module: nn.Module) -> None:
    """Undo :func:`skip_caches`."""
    for child in module.modules():
        for key, hook in list(child._forward_pre_hooks.items()):
            if isinstance(hook, functools.partial) and hook.func is _without_cache:
                del child._forward_pre_hooks[key]
                child._forward_pre_hooks_with_kwargs.pop(key, None)


def _parameters(model: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def _without_cache(
    names: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    asked = given.get("use_cache") is not None or given.get("past_key_values") is not None
    if asked or not torch.is_grad_enabled() or len(args) > names.index("use_cache"):
        return None
    return args, {**kwargs, "use_cache": False}
