"""The forward of a recomputed block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lightning_lora.gradient_checkpointing.arguments import Arguments
from lightning_lora.gradient_checkpointing.replay import FirstRun, SecondRun
from lightning_lora.patches import original


class Called:
    """Whether a block's ``forward`` was called with gradients, since its checkpointing is on."""

    def __init__(self) -> None:
        self.yet = False


def recomputed_forward(
    block: nn.Module, previous: Callable[..., Any] | None, offload: bool, called: Called, /, *args: Any, **kwargs: Any
) -> Any:
    """Call the block; where gradients are recorded, keep only its inputs and compute the rest again in backward.

    Takes the place of ``block.forward`` by :func:`~lightning_lora.patches.patch`. Whether the block is in train mode
    does not matter: ``from_pretrained`` returns models in eval mode, and Lightning leaves them in it.

    Args:
        block: The block.
        previous: What stood in its ``__dict__`` before.
        offload: Whether its inputs wait in CPU memory.
        called: Notes the call.
        args: The block's own.
        kwargs: The block's own.
    """
    forward = original(block, "forward", previous)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    called.yet = True
    call, inputs = _prepared(forward, args, kwargs)
    away = _device_of(inputs) if offload else None
    with nullcontext() if away is None else save_on_cpu(pin_memory=away.type == "cuda", device_type=away.type):
        return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=True, **_contexts(block))


def _prepared(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """What checkpoint is to call, and with which inputs.

    torch looks for tensors among positional arguments only: for the devices whose random state the recomputation
    needs, and for what it saves as autograd does (checked for changes in place, moved by saved-tensor hooks).
    """
    if torch.compiler.is_compiling():  # it recomputes single operations, and refuses containers that change
        return functools.partial(_by_position, forward, len(args), tuple(kwargs)), [*args, *kwargs.values()]
    arguments = Arguments(args, kwargs)
    return functools.partial(_call, forward, arguments), arguments.take_leaves()


def _by_position(forward: Callable[..., Any], count: int, names: tuple[str, ...], *inputs: Any) -> Any:
    return forward(*inputs[:count], **dict(zip(names, inputs[count:], strict=True)))


def _call(forward: Callable[..., Any], arguments: Arguments, *leaves: Any) -> Any:
    args, kwargs = arguments.of_run(leaves)
    return forward(*args, **kwargs)


def _device_of(inputs: list[Any]) -> torch.device | None:
    """The device of the inputs, if it is not the CPU."""
    return next((v.device for v in inputs if isinstance(v, Tensor) and v.device.type != "cpu"), None)


def _contexts(block: nn.Module) -> dict[str, Any]:
    if torch.compiler.is_compiling():  # it takes no contexts, recomputes single operations, and updates buffers once
        return {}
    runs = FirstRun(block), SecondRun(block)
    return {"context_fn": lambda: runs}
