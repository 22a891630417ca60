"""Products in bf16 or fp16 on a CPU without instructions for them: in fp32, by torch's own operations, rounded once.

There torch takes a product in 16 bits value by value
(https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cpu/BlasKernel.cpp), 5 to 8 times as long as one
in fp32 in the forward pass and up to 200 times in the backward pass. A copy in fp32 is exact, and takes little beside
the product of many rows. Only blocks of a matrix are copied at a time, and a block is summed to its end before it is
rounded.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.fused.products import Base, Products, Update, is_zero

_BLOCK = 2**22  # numbers of a matrix in fp32 at a time
_LEAST = 256  # rows of a block, each of which is copied for as many products
_FEW = 16  # rows, of which torch's own product is not slower
_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this is an x86 CPU that has no instructions for products in ``dtype``."""
    if dtype not in _SUPPORT or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    ask = getattr(torch.ops.mkldnn, _SUPPORT[dtype], None)  # a torch without oneDNN has none
    return ask is not None and not ask()


class _Term(NamedTuple):
    """``factor left right`` of ``(rows, depth)`` and ``(depth, columns)``."""

    left: Tensor
    right: Tensor
    factor: float = 1.0


class WidenedProducts(Products):
    """In fp32, of 16 rows and more, where no derivative of a product is needed; else torch's products."""

    @override
    def project(self, x: Tensor, small_A: Tensor, factor: float = 1.0) -> Tensor:
        if not _pays(x):
            return super().project(x, small_A, factor)
        return _sum(x.new_empty(len(x), len(small_A)), None, [_Term(x, small_A.t(), factor)])

    @override
    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, small_B: Tensor, *, out: Tensor
    ) -> None:
        if not _pays(x) or is_zero(small_B):
            super().output(x, weight, bias, hidden, small_B, out=out)
            return
        start = None if bias is None else bias.expand_as(out)
        _sum(out, start, [_Term(x, weight.t()), _Term(hidden, small_B.t())])

    @override
    def gradients_of_update(
        self, gradient: Tensor, small_B: Tensor, *, hidden: Tensor | None, like: Tensor, to_hidden: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not _pays(gradient):
            return super().gradients_of_update(gradient, small_B, hidden=hidden, like=like, to_hidden=to_hidden)
        inner = self.project(gradient, small_B.t()) if to_hidden else None
        if hidden is None:
            return inner, None
        return inner, torch.empty_like(like).copy_(_sum_over_rows(hidden, gradient).t())

    @override
    def gradient_of_first(self, inner: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        if not _pays(x):
            return super().gradient_of_first(inner, x, factor)
        return _sum_over_rows(inner, x, factor)

    @override
    def gradient_of_input(
        self, gathered: Tensor | None, base: Base | None, update: Update | None = None
    ) -> Tensor | None:
        terms = [_Term(*term) for term in (base, update) if term is not None]
        if not terms or not _pays(terms[0].left):
            return super().gradient_of_input(gathered, base, update)
        left, right, _ = terms[0]
        return _sum(left.new_empty(len(left), right.shape[1]) if gathered is None else gathered, gathered, terms)


WIDENED = WidenedProducts()


def _pays(left: Tensor) -> bool:
    return len(left) >= _FEW and not torch.is_grad_enabled()


def _sum(out: Tensor, start: Tensor | None, terms: list[_Term]) -> Tensor:
    """``out = start + terms``, where ``start`` may be ``out``."""
    depth = max(term.left.shape[1] for term in terms)
    for columns in _blocks(out.shape[1], depth):
        width = columns.stop - columns.start
        for rows in _blocks(len(out), max(depth, width)):
            total = None if start is None else start[rows, columns].to(torch.float32, copy=True)
            for left, right, factor in terms:
                total = _added(total, left[rows].float(), right[:, columns].float(), factor)
            assert total is not None
            out[rows, columns] = total
    return out


def _sum_over_rows(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """``factor left^T right`` in fp32."""
    total = None
    for rows in _blocks(len(left), max(left.shape[1], right.shape[1])):
        total = _added(total, left[rows].t().float(), right[rows].float(), factor)
    assert total is not None
    return total


def _added(total: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    if total is None:  # in place, too, since autocast would take this in 16 bits again
        return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=factor)
    return total.addmm_(left, right, alpha=factor)


def _blocks(size: int, other: int) -> Iterator[slice]:
    """Parts of a dimension of a matrix whose other one is ``other``."""
    step = max(_LEAST, _BLOCK // max(1, other))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
