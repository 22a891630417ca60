"""Which kind of dropout is drawn where."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from lightning_lora.errors import MissingDependencyError
from lightning_lora.fused.amx import AmxDropout, find_amx, may_drop
from lightning_lora.fused.dropout import LEVELS, Dropout, MaskedDropout
from lightning_lora.fused.products import TORCH, Products
from lightning_lora.fused.rare_dropout import RareDropout, is_rare
from lightning_lora.fused.widened import WIDENED, is_emulated

KERNELS = ("torch", "triton", "amx")
_FIXED: ContextVar[int | None] = ContextVar("seed of all masks", default=None)


def draw_dropout(probability: float, *, like: Tensor, kernels: str = "torch") -> Dropout:
    """Draw from torch's random stream on the CPU, on every device: no synchronisation, and a resume continues it.

    Args:
        probability: Of dropping a value. Triton's kernels meet it, and so do few places on a CPU; AMX's to the nearest
            of 65536 levels; of torch's masks the share is one of 256 levels, 255 at most, and which of the two beside
            ``probability`` it is, is drawn, too, so that the mean is exact.
        like: Has the dtype and the device of the values.
        kernels: One of ``KERNELS``; "triton" acts on CUDA, and below fp64; "amx" on a CPU that has it, in bf16.

    Raises:
        MissingDependencyError: If Triton's kernels are asked for where it is not installed, or AMX's where they can't
            be compiled.
    """
    fixed = _FIXED.get()
    amx = find_amx() if kernels == "amx" and _is_on_this_cpu(like) else None
    products = amx or products_of(like)
    if probability == 0.0:
        return Dropout(products)
    seed = int(torch.randint(0, 2**31 - 1, (), device="cpu")) if fixed is None else fixed
    if kernels == "triton" and fixed is None and _runs_triton(like):
        drawn: Dropout = _kernels().KernelDropout(probability, seed)
        return drawn
    if amx is not None and (threshold := AmxDropout.threshold_of(probability)) and may_drop(like):
        return AmxDropout(threshold, seed, amx)
    if fixed is None and is_rare(probability, like):
        return RareDropout(probability, seed, products)
    exact = probability * LEVELS
    below = int(exact)
    above = (seed % 65_521) / 65_521 < exact - below
    dropped = min(below + above, LEVELS - 1)
    return MaskedDropout(seed, dropped, products) if dropped else Dropout(products)


def products_of(like: Tensor) -> Products:
    """What takes the products in the dtype of ``like``, on its device, where no kernels are asked for."""
    return WIDENED if _is_on_this_cpu(like) and is_emulated(like.dtype) else TORCH


def _is_on_this_cpu(like: Tensor) -> bool:
    return like.device.type == "cpu" and not is_dry_run()  # a plan of memory is for any device


def is_dry_run() -> bool:
    """Whether tensors have no values now, see :func:`fixed_seed`."""
    return _FIXED.get() is not None


def prepare_kernels(kernels: str, device: torch.device) -> None:
    """Compile now what would be compiled in the first step.

    Raises:
        MissingDependencyError: If it can't be compiled.
    """
    if kernels == "amx" and device.type == "cpu":
        find_amx()


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
