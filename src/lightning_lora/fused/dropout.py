"""A layer's input on its way through A, and dropout of it, whose mask is drawn again wherever it is needed.

So nothing of a mask is saved.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_lora.errors import MissingDependencyError

KERNELS = ("torch", "triton")
_LEVELS = 256  # of a byte
_FIXED: ContextVar[int | None] = ContextVar("seed of all masks", default=None)
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mask(NamedTuple):
    """All bits set where a value is kept, none elsewhere; what is kept is not scaled."""

    bits: Tensor

    @classmethod
    def of(cls, lanes: Tensor, like: Tensor) -> Mask:
        """From -1 for what is kept, and 0, for values of the dtype of ``like``."""
        return cls(lanes.to(_INTEGER[like.dtype.itemsize]))

    def keep(self, values: Tensor) -> Tensor:
        """The values where the mask keeps them, zero elsewhere."""
        if values.requires_grad and torch.is_grad_enabled():  # bits have no derivative
            return values * self.keep(torch.ones_like(values))
        return torch.bitwise_and(values.view(self.bits.dtype), self.bits).view(values.dtype)

    def keep_(self, values: Tensor) -> Tensor:
        """:meth:`keep`, in place where autograd does not look."""
        if values.requires_grad and torch.is_grad_enabled():
            return self.keep(values)
        values.view(self.bits.dtype).bitwise_and_(self.bits)
        return values


class Dropout:
    """One draw of dropout: here of none, everything is kept.

    Attributes:
        scale: Factor of what is kept, so that the expectation stays; it goes into B, none of the methods applies it.
    """

    scale: float = 1.0

    def mask(self, shape: torch.Size, like: Tensor) -> Mask | None:
        """The mask of values in this shape, of the dtype and on the device of ``like``; None: all are kept."""
        return None

    def keep(self, values: Tensor) -> Tensor:
        """The values that are kept, zero elsewhere."""
        mask = self.mask(values.shape, values)
        return values if mask is None else mask.keep(values)

    def project(self, x: Tensor, small_A: Tensor) -> Tensor:
        """``keep(x) A^T``.

        Args:
            x: ``(tokens, in_features)``.
            small_A: ``(rank, in_features)`` in the dtype of ``x``.

        Returns:
            ``(tokens, rank)``.
        """
        return F.linear(self.keep(x), small_A)

    def pull_back(
        self, inner: Tensor, small_A: Tensor, *, x: Tensor | None, to_input: bool, gathered: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that the gradient of a projection gives.

        Args:
            inner: ``(tokens, rank)``: of the projection.
            small_A: ``(rank, in_features)``.
            x: ``(tokens, in_features)``, if the gradient of A is wanted.
            to_input: Whether the gradient of the input is wanted.
            gathered: ``(tokens, in_features)``: what the input's gradient is added to. Nobody else has that tensor: it
                is changed where autograd does not look.

        Returns:
            ``inner^T keep(x)`` and ``gathered + keep(inner A)``.
        """
        mask = self.mask(torch.Size((len(inner), small_A.shape[1])), inner)
        grad_A = grad_input = None
        if x is not None:
            grad_A = inner.t().mm(x if mask is None else mask.keep(x))
        if to_input and mask is None:
            grad_input = add_product(gathered, inner, small_A)
        elif to_input and mask is not None:
            kept = mask.keep_(inner.mm(small_A))
            grad_input = kept if gathered is None else kept.add_(gathered)
        return grad_A, grad_input


class MaskedDropout(Dropout):
    """Masks of bits by torch's own operations, on any device.

    Args:
        seed: Of the mask.
        dropped: Of 256 values, how many are dropped on average.
    """

    def __init__(self, seed: int, dropped: int) -> None:
        self.seed, self.dropped, self.scale = seed, dropped, _LEVELS / (_LEVELS - dropped)

    @override
    def mask(self, shape: torch.Size, like: Tensor) -> Mask:
        size = shape.numel()
        generator = torch.Generator(device=like.device).manual_seed(self.seed)
        drawn = torch.empty(-(-size // 8), dtype=torch.int64, device=like.device)
        lanes = drawn.random_(-(2**63), None, generator=generator).view(torch.int8)[:size]
        # Each byte of a random number decides about one value: those above the rest are dropped. Two passes over bytes
        # make 0 of them, and -1, all bits set, of the others; a comparison and its booleans take four times as long.
        lowest_dropped = _LEVELS // 2 - self.dropped
        lanes.clamp_(lowest_dropped - 1, lowest_dropped).sub_(lowest_dropped)
        return Mask.of(lanes.view(shape), like)


def add_product(gathered: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``gathered + left right``, in place where autograd does not look."""
    if gathered is None:
        return left.mm(right)
    return (gathered.clone() if torch.is_grad_enabled() else gathered).addmm_(left, right)


def draw_dropout(probability: float, *, like: Tensor, kernels: str = "torch") -> Dropout:
    """Draw from torch's random stream on the CPU, on every device: no synchronisation, and a resume continues it.

    Args:
        probability: Of dropping a value. Triton's kernels meet it; of torch's masks the share is one of 256 levels, 255
            at most, and which of the two beside ``probability`` it is, is drawn, too, so that the mean is exact.
        like: Has the dtype and the device of the values.
        kernels: One of ``KERNELS``; "triton" acts on CUDA, and below fp64.

    Raises:
        MissingDependencyError: If Triton's kernels are asked for where it is not installed.
    """
    if probability == 0.0:
        return Dropout()
    fixed = _FIXED.get()
    seed = int(torch.randint(0, 2**31 - 1, (), device="cpu")) if fixed is None else fixed
    if kernels == "triton" and fixed is None and _runs_triton(like):
        drawn: Dropout = _kernels().KernelDropout(probability, seed)
        return drawn
    exact = probability * _LEVELS
    below = int(exact)
    above = (seed % 65_521) / 65_521 < exact - below
    dropped = min(below + above, _LEVELS - 1)
    return MaskedDropout(seed, dropped) if dropped else Dropout()


def _runs_triton(like: Tensor) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return like.dtype.itemsize <= 4 and (like.is_cuda or interpreted)


def _kernels() -> ModuleType:
    try:
        return importlib.import_module("lightning_lora.fused.kernels")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingDependencyError(
            'LoRAConfig(kernels="triton"): triton is not installed. It comes with torch for CUDA on Linux; '
            'on Windows `pip install triton-windows`, or leave kernels="torch".'
        ) from error


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Within this context nothing is drawn from torch's stream, for a run on tensors without values."""
    token = _FIXED.set(seed)
    try:
        yield
    finally:
        _FIXED.reset(token)
