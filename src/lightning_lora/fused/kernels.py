"""Triton kernels of a layer's input on its way through A, with dropout whose mask never reaches memory.

With torch's own operations a mask costs some seven passes over a tensor as large as the input, in each direction. Here
each kernel draws it again in registers while it reads the input, which it has to do anyway:

* ``keep(x) A^T``: one read of x.
* ``inner^T keep(x)``: one read of x. Parts of the tokens are added up by a second, small operation and not by atomic
  additions, whose order changes from run to run.
* ``gathered + keep(inner A)``: one read and one write of what is gathered, rounded once.

The random numbers are Philox's (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a function of the
seed and of the place of a value alone: 128 features are four groups of 32, and the four numbers of one call decide
about the same place in each group. So the kernels may cut their work differently, and draw the same mask.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from lightning_lora.fused.dropout import Mask, Pull, WithMask
from lightning_lora.fused.products import Update

_TOKENS = 64  # of a program, and of a step in one
_GROUP = 32  # features
_BLOCK = 4 * _GROUP
_PARTS = 16  # of the tokens, in the gradient of A
_LEAST_RANK = 16  # that tl.dot takes


@triton.jit
def _numbers(seed, token, block, blocks, GROUP: tl.constexpr):
    """Random numbers ``(tokens, GROUP)`` for each of the four groups of a block of features."""
    place = (token[:, None].to(tl.int64) * blocks + block) * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.randint4x(seed, place)


@triton.jit
def _load(start, row, column, rows, columns):
    """``(rows, columns)`` of a contiguous matrix, zero beyond its ends."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(start + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)


@triton.jit
def _keep(values, number, threshold):
    # Older Tritons draw 64 bits where the place has 64: the lower half of them.
    return tl.where(number.to(tl.uint32).to(tl.int64) >= threshold, values, tl.zeros_like(values))


@triton.jit
def _project_group(x, a, token, column, number, threshold, tokens, width, rank, RANK: tl.constexpr):
    kept = _keep(_load(x, token, column, tokens, width), number, threshold)
    small = _load(a, tl.arange(0, RANK), column, rank, width)
    return tl.dot(kept, tl.trans(small), input_precision="ieee")


@triton.jit(do_not_specialize=["seed", "tokens"])
def _project(
    x, a, hidden, seed, threshold, factor, tokens, width, rank,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``hidden = factor keep(x) a^T``; a program for TOKENS rows."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    blocks = tl.cdiv(width, 4 * GROUP)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for block in range(0, blocks):
        n0, n1, n2, n3 = _numbers(seed, token, block, blocks, GROUP)
        column = block * 4 * GROUP + tl.arange(0, GROUP)
        total += _project_group(x, a, token, column, n0, threshold, tokens, width, rank, RANK)
        total += _project_group(x, a, token, column + GROUP, n1, threshold, tokens, width, rank, RANK)
        total += _project_group(x, a, token, column + 2 * GROUP, n2, threshold, tokens, width, rank, RANK)
        total += _project_group(x, a, token, column + 3 * GROUP, n3, threshold, tokens, width, rank, RANK)
    index = tl.arange(0, RANK)
    inside = (token[:, None] < tokens) & (index[None, :] < rank)
    place = hidden + token[:, None].to(tl.int64) * rank + index[None, :]
    tl.store(place, (total * factor).to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_group(x, inner, token, column, number, threshold, tokens, width):
    kept = _keep(_load(x, token, column, tokens, width), number, threshold)
    return tl.dot(tl.trans(inner), kept, input_precision="ieee")


@triton.jit
def _store_group(partial, part, column, values, width, rank, RANK: tl.constexpr):
    index = tl.arange(0, RANK)
    inside = (index[:, None] < rank) & (column[None, :] < width)
    place = (part * rank + index[:, None]).to(tl.int64) * width + column[None, :]
    tl.store(partial + place, values, mask=inside)


@triton.jit(do_not_specialize=["seed", "tokens"])
def _gradient_of_A(
    x, inner, partial, seed, threshold, factor, tokens, width, rank, steps,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``partial[part] = factor inner^T keep(x)`` over ``steps * TOKENS`` rows; a program for a block and a part."""
    block, part = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    column = block * 4 * GROUP + tl.arange(0, GROUP)
    t0 = tl.zeros((RANK, GROUP), dtype=tl.float32)
    t1 = tl.zeros((RANK, GROUP), dtype=tl.float32)
    t2 = tl.zeros((RANK, GROUP), dtype=tl.float32)
    t3 = tl.zeros((RANK, GROUP), dtype=tl.float32)
    for step in range(0, steps):
        token = (part * steps + step) * TOKENS + tl.arange(0, TOKENS)
        n0, n1, n2, n3 = _numbers(seed, token, block, blocks, GROUP)
        given = _load(inner, token, tl.arange(0, RANK), tokens, rank)
        t0 += _gradient_group(x, given, token, column, n0, threshold, tokens, width)
        t1 += _gradient_group(x, given, token, column + GROUP, n1, threshold, tokens, width)
        t2 += _gradient_group(x, given, token, column + 2 * GROUP, n2, threshold, tokens, width)
        t3 += _gradient_group(x, given, token, column + 3 * GROUP, n3, threshold, tokens, width)
    _store_group(partial, part, column, t0 * factor, width, rank, RANK)
    _store_group(partial, part, column + GROUP, t1 * factor, width, rank, RANK)
    _store_group(partial, part, column + 2 * GROUP, t2 * factor, width, rank, RANK)
    _store_group(partial, part, column + 3 * GROUP, t3 * factor, width, rank, RANK)


@triton.jit
def _add_group(gathered, given, a, token, column, number, threshold, factor, tokens, width, rank, RANK: tl.constexpr):
    small = _load(a, tl.arange(0, RANK), column, rank, width)
    added = _keep(tl.dot(given, small, input_precision="ieee") * factor, number, threshold)
    inside = (token[:, None] < tokens) & (column[None, :] < width)
    place = gathered + token[:, None].to(tl.int64) * width + column[None, :]
    before = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (before.to(tl.float32) + added).to(gathered.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "tokens"])
def _add_to_input(
    gathered, inner, a, seed, threshold, factor, tokens, width, rank,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``gathered += factor keep(inner a)``; a program for TOKENS rows and a block of features."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    column = block * 4 * GROUP + tl.arange(0, GROUP)
    n0, n1, n2, n3 = _numbers(seed, token, block, blocks, GROUP)
    given = _load(inner, token, tl.arange(0, RANK), tokens, rank)
    _add_group(gathered, given, a, token, column, n0, threshold, factor, tokens, width, rank, RANK)
    _add_group(gathered, given, a, token, column + GROUP, n1, threshold, factor, tokens, width, rank, RANK)
    _add_group(gathered, given, a, token, column + 2 * GROUP, n2, threshold, factor, tokens, width, rank, RANK)
    _add_group(gathered, given, a, token, column + 3 * GROUP, n3, threshold, factor, tokens, width, rank, RANK)


class KernelDropout(WithMask):
    """Dropout inside of the kernels.

    Args:
        probability: Of dropping a value, in ``(0, 1)``; it is met to 1 in 2**32.
        seed: Of the mask.
    """

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__()
        self.seed, self._threshold = seed, int(probability * 2**32)
        self.scale = 1.0 / (1.0 - probability)

    @override
    def project(self, x: Tensor, small_A: Tensor, factor: float = 1.0) -> Tensor:
        if torch.is_grad_enabled():  # kernels have no derivative
            return super().project(x, small_A, factor)
        x, small_A = x.contiguous(), small_A.contiguous()
        hidden = x.new_empty(len(x), len(small_A))
        if len(x):
            self._run(_project, (triton.cdiv(len(x), _TOKENS),), (x, small_A, hidden), small_A, factor, len(x))
        return hidden

    @override
    def pull_back(self, pull: Pull) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():
            return super().pull_back(pull)
        (inner, small_A, factor), x, factor_A, to_input, gathered, base = pull
        inner, small_A = inner.contiguous(), small_A.contiguous()
        tokens, (rank, width) = len(inner), small_A.shape
        blocks = triton.cdiv(width, _BLOCK)
        grad_A = grad_input = None
        if x is not None:
            steps = max(1, triton.cdiv(tokens, _TOKENS * _PARTS))
            partial = inner.new_empty(_PARTS, rank, width, dtype=torch.float32)
            tensors = x.contiguous(), inner, partial
            self._run(_gradient_of_A, (blocks, _PARTS), tensors, small_A, factor_A, tokens, steps)
            grad_A = partial.sum(0)
        if to_input:
            gathered = self.products.gradient_of_input(gathered, base)
            grad_input = inner.new_zeros(tokens, width) if gathered is None else gathered.contiguous()
            if tokens:
                programs = (triton.cdiv(tokens, _TOKENS), blocks)
                self._run(_add_to_input, programs, (grad_input, inner, small_A), small_A, factor, tokens)
        return grad_A, grad_input

    @override
    def mask(self, shape: torch.Size, like: Tensor) -> Mask:
        with torch.no_grad():
            ones = like.new_ones(shape[:-1].numel(), 1)
            _, kept = self.pull_back(Pull(Update(ones, like.new_ones(1, shape[-1]))))
        assert kept is not None
        return Mask.of((kept != 0).view(shape).to(torch.int8).neg_(), like)

    def _run(
        self,
        kernel: Any,
        programs: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        small_A: Tensor,
        factor: float,
        *sizes: int,
    ) -> None:
        rank, width = small_A.shape
        tokens, *steps = sizes
        least = max(_LEAST_RANK, triton.next_power_of_2(rank))
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            kernel[programs](
                *tensors,
                self.seed,
                self._threshold,
                float(factor),
                tokens,
                width,
                rank,
                *steps,
                TOKENS=_TOKENS,
                GROUP=_GROUP,
                RANK=least,
            )
