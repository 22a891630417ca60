"""What a recomputation must find as the first run found it, and must not change a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.class_swap import original_class
from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.layers import AdaptedLayer, adapted_layers


class FirstRun:
    """Context of the first run, which may change no buffer but statistics that :class:`KeptStatistics` knows.

    Raises:
        UnsupportedSetupError: On exit, if it did: the recomputation would find the new value, and change it again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        norms = {id(norm) for norm in updating_norms(block)}
        holders = ((path, child) for path, child in block.named_modules() if child._buffers and id(child) not in norms)
        self._holders = list(holders)
        self._before: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self) -> None:
        self._before = {name: (buffer, _version(buffer)) for name, buffer in self._buffers()}

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        before, self._before = self._before, {}
        if kind is not None:
            return
        for name, buffer in self._buffers():
            if name in before and _is_update(*before[name], buffer):
                raise UnsupportedSetupError(
                    f"gradient checkpointing runs each block twice, and a {original_class(self._block).__name__} "
                    f"changes its buffer {name!r} when it runs: its gradients would be wrong. Leave this block out, "
                    "by naming the others in GradientCheckpointingConfig(blocks=...), or set what updates the buffer "
                    "to eval mode."
                )

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for path, child in self._holders:
            yield from child.named_buffers(path, recurse=False)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_update(before: Tensor, version: int, now: Tensor) -> bool:
    # One of another shape is a table that grew with the sequence, such as that of rotary embeddings.
    return _version(now) != version if now is before else now.shape == before.shape


class SecondRun:
    """Context of a recomputation; may be entered again."""

    def __init__(self, block: nn.Module) -> None:
        self._contexts = (KeptStatistics(updating_norms(block)), KeptAttention(), KeptActive(block))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


class KeptStatistics:
    """Context in which norm layers update copies of their running statistics; may be entered again.

    BatchNorm in train mode updates its statistics whenever it runs. They are no input of what it computes, so that a
    recomputation with copies computes the same.
    """

    def __init__(self, norms: list[nn.Module]) -> None:
        self._norms = norms
        self._buffers: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._buffers = [dict(norm._buffers) for norm in self._norms]
        for norm, buffers in zip(self._norms, self._buffers, strict=True):
            norm._buffers.update({key: value.clone() for key, value in buffers.items() if value is not None})

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self._norms, self._buffers, strict=True):
            norm._buffers.update(buffers)


def updating_norms(block: nn.Module) -> list[nn.Module]:
    """The norm layers inside ``block`` whose running statistics its next call changes."""
    return [child for child in block.modules() if _updates_statistics(child)]


def _updates_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


class KeptAttention:
    """Context in which attention uses the kernels that were allowed when this was made; may be entered again.

    A training step that runs within ``sdpa_kernel(...)`` has left it when Lightning calls backward. torch's checkpoint
    brings autocast back for the recomputation, and nothing else.
    """

    def __init__(self) -> None:
        self._allowed = _allowed_kernels()
        self._context: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._context = nullcontext() if _allowed_kernels() == self._allowed else sdpa_kernel(self._allowed)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class KeptActive:
    """Context in which the adapters act that were active when this was made; may be entered again.

    A loss against the model without adapters, as in DPO, has left ``disable_adapters`` when it calls backward.
    """

    def __init__(self, block: nn.Module) -> None:
        self._wanted = [(layer, layer.active) for _, layer in adapted_layers(block)]
        self._found: list[tuple[AdaptedLayer, tuple[str, ...]]] = []

    def __enter__(self) -> None:
        # A layer whose adapters were removed meanwhile has no active ones.
        adapted = [(layer, active) for layer, active in self._wanted if isinstance(layer, AdaptedLayer)]
        self._found = [(layer, layer.active) for layer, _ in adapted]
        for layer, active in adapted:
            layer.active = active

    def __exit__(self, *error: object) -> None:
        for layer, active in self._found:
            layer.active = active


def _allowed_kernels() -> list[SDPBackend]:
    cuda: Any = torch.backends.cuda  # whose flags hold for the CPU, too
    allowed = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, is_allowed in allowed.items() if is_allowed]
