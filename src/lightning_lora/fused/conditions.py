"""Where one node in the place of several is right: anywhere but in front of tools that look inside of a layer."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_DEVICES = ("cpu", "cuda")  # whose generators take a seed for a mask of whole 64-bit numbers
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def may_fuse(input: object, adapter: nn.Module) -> bool:
    """Whether a fused node may compute a layer with ``adapter`` for this input: hooks on it want to be called."""
    return is_eager(input) and "forward" not in vars(adapter) and not any(vars(adapter)[name] for name in _HOOKS)


def is_eager(input: object) -> TypeGuard[Tensor]:
    """Whether nothing but autograd looks at what is done with this input.

    Compilers fuse torch's own operations better than a node that they can't look into; tracing, torch.func and
    forward-mode derivatives need operations that have their rules.
    """
    return (
        isinstance(input, Tensor)
        and input.device.type in _DEVICES
        and input.is_floating_point()
        and input.layout == torch.strided
        and not input.is_nested
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def product_dtype(input: Tensor) -> torch.dtype:
    """Dtype in which ``F.linear`` multiplies: autocast's where it acts, the input's elsewhere."""
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(kind)
    return input.dtype
