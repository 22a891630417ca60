"""Products in bf16 by tiles of the CPU (Intel's AMX), where torch's own are bound by what they read and write.

An update of rank 16 has a few percent of the arithmetic of its layer. But oneDNN, whose products torch calls, takes
each of its six products for itself, and reads or writes a matrix as large as the input or the output in each, so that
together they take half as long as the two large ones. Here the products that read the same rows run while those are in
the cache, and the last product of an output is the first part of the large one, in the same sums in fp32, which are
rounded once. A mask of dropout is drawn in registers, from its seed and the place of an element, wherever it acts.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.fused.compiled import load_compiled
from lightning_lora.fused.dropout import Mask, Pull, WithMask
from lightning_lora.fused.products import PLAIN_TENSORS, Base, Products, Update, add_product, is_zero

_FLAGS = "-std=c++17 -O3 -fopenmp -mavx512f -mavx512bw -mavx512vl -mavx512bf16 -mvaes -mamx-tile -mamx-bf16"
_NEEDED = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "vaes"}
_WIDTH = 32  # numbers in a row of a tile, of which matrices consist
_LEVELS = 2**16  # of the random bits of an element
_LARGEST = 2**20  # numbers in a weight: with larger ones oneDNN is as fast, or faster
_KEEP_ALL = (0, 0)  # seed and threshold of a mask


@cache
def find_amx() -> AmxProducts | None:
    """The products, compiled now if they never were, or None on a machine without AMX.

    Raises:
        MissingDependencyError: On a machine with AMX, if they can't be compiled.
    """
    if not _has_amx():
        return None
    library = load_compiled(Path(__file__).with_suffix(".cpp"), _FLAGS.split())
    if library.lora_request_tiles():  # the kernel is too old, or keeps them from this process
        return None
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    mask = (ctypes.c_uint64, ctypes.c_uint32)
    library.lora_project.argtypes = [*[pointer] * 3, *[size] * 3, *mask, number]
    library.lora_sum.argtypes = [*[pointer] * 3, size, *[pointer] * 3, *[size] * 4, *[number] * 3, *mask, number]
    library.lora_pull_back.argtypes = [
        *[pointer] * 4, size, pointer, *[size] * 3, real, number, *mask, number
    ]  # fmt: skip
    library.lora_mask.argtypes = [pointer, size, size, *mask]
    for function in (library.lora_project, library.lora_sum, library.lora_pull_back, library.lora_mask):
        function.restype = None
    return AmxProducts(library)


def _has_amx() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(flags.split()) >= _NEEDED


class AmxProducts(Products):
    """Of matrices in bf16 whose features are multiples of 32, and of weights that are not large; else torch's products.

    Sums are in fp32. Those over tokens depend on how many threads there are, and on nothing else.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._project, self._sum, self._pull_back = library.lora_project, library.lora_sum, library.lora_pull_back

    @override
    def project(self, x: Tensor, small_A: Tensor, factor: float = 1.0) -> Tensor:
        if factor != 1.0 or not fit_projection(x, small_A):
            return super().project(x, small_A, factor)
        return self.project_kept(x, small_A, _KEEP_ALL)

    def project_kept(self, x: Tensor, small_A: Tensor, mask: tuple[int, int]) -> Tensor:
        """``keep(x) A^T`` with a mask from its seed and its threshold."""
        x, small_A = x.contiguous(), small_A.contiguous()
        (tokens, width), rank = x.shape, len(small_A)
        hidden = x.new_empty(tokens, rank)
        threads = torch.get_num_threads()
        self._project(x.data_ptr(), small_A.data_ptr(), hidden.data_ptr(), tokens, width, rank, *mask, threads)
        return hidden

    @override
    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, small_B: Tensor, *, out: Tensor
    ) -> None:
        (tokens, width), (_, depth), rank = out.shape, x.shape, hidden.shape[1]
        agree = len(x) == len(hidden) == tokens and (width, rank) == small_B.shape
        agree = agree and (bias is None or bias.shape == (width,))
        agree = agree and weight.shape == (width, depth) and hidden.stride(1) == 1 and out.is_contiguous()
        fits = agree and fit_weight(weight) and fit(x, out) and plain(hidden, small_B)
        if not fits or is_zero(small_B):
            super().output(x, weight, bias, hidden, small_B, out=out)
            return
        x, small_B = x.contiguous(), small_B.contiguous()
        wide_bias = None if bias is None else bias.to(torch.float32)
        self._sum(
            *(x.data_ptr(), weight.data_ptr(), hidden.data_ptr(), hidden.stride(0), small_B.data_ptr()),
            *(_address(wide_bias), out.data_ptr(), tokens, depth, width, rank),
            *(weight.is_contiguous(), True, False, *_KEEP_ALL, torch.get_num_threads()),
        )

    @override
    def gradients_of_update(
        self, gradient: Tensor, small_B: Tensor, *, hidden: Tensor | None, like: Tensor, to_hidden: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        (tokens, width), rank = gradient.shape, small_B.shape[1]
        agree = len(small_B) == width and like.shape == small_B.shape and like.is_contiguous()
        agree = agree and like.dtype == torch.float32 and type(like) in PLAIN_TENSORS
        if hidden is not None:
            agree = agree and hidden.shape == (tokens, rank) and hidden.stride(1) == 1 and plain(hidden)
        if not agree or not fit(gradient) or not plain(small_B):
            return super().gradients_of_update(gradient, small_B, hidden=hidden, like=like, to_hidden=to_hidden)
        gradient, small_B = gradient.contiguous(), small_B.contiguous()
        inner = gradient.new_empty(tokens, rank) if to_hidden else None
        grad_B = None if hidden is None else torch.empty_like(like)
        stride = 0 if hidden is None else hidden.stride(0)
        self._pull_back(
            *(gradient.data_ptr(), small_B.data_ptr(), _address(inner), _address(hidden), stride, _address(grad_B)),
            *(tokens, width, rank, 1.0, True, *_KEEP_ALL, torch.get_num_threads()),
        )
        return inner, grad_B

    @override
    def gradient_of_first(self, inner: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        if len(inner) != len(x) or not fit(x) or not plain(inner):
            return super().gradient_of_first(inner, x, factor)
        return self.gradient_of_first_kept(inner, x, factor, _KEEP_ALL)

    def gradient_of_first_kept(self, inner: Tensor, x: Tensor, factor: float, mask: tuple[int, int]) -> Tensor:
        """``factor inner^T keep(x)``, in fp32."""
        inner, x = inner.contiguous(), x.contiguous()
        (tokens, width), rank = x.shape, inner.shape[1]
        grad_A = x.new_empty(rank, width, dtype=torch.float32)
        self._pull_back(
            *(x.data_ptr(), None, None, inner.data_ptr(), rank, grad_A.data_ptr()),
            *(tokens, width, rank, factor, False, *mask, torch.get_num_threads()),
        )
        return grad_A

    @override
    def gradient_of_input(
        self, gathered: Tensor | None, base: Base | None, update: Update | None = None
    ) -> Tensor | None:
        if update is None:
            return self.sum_kept(gathered, base, None, _KEEP_ALL)
        inner, small_A, factor = update
        if factor != 1.0 or not fit_update(gathered, inner, small_A):
            return super().gradient_of_input(gathered, base, update)
        return self.sum_kept(gathered, base, (inner, small_A), _KEEP_ALL)

    def sum_kept(
        self, gathered: Tensor | None, base: Base | None, update: Base | None, mask: tuple[int, int]
    ) -> Tensor | None:
        """``gathered + gradient W + keep(inner A)``, of what there is; the update is known to fit."""
        if base is not None and not _fits_base(base, update, gathered):
            gathered, base = add_product(gathered, *base), None
            if update is not None and not fit_update(gathered, *update):
                return add_product(gathered, *update)  # other shapes alone: torch says so
        either = base or update
        if either is None:
            return gathered
        out = either[0].new_empty(len(either[0]), either[1].shape[1]) if gathered is None else gathered
        gradient, weight = (None, None) if base is None else (base[0].contiguous(), base[1])
        inner, small_A = (None, None) if update is None else (update[0].contiguous(), update[1].contiguous())
        depth, rank = (0 if left is None else left.shape[1] for left in (gradient, inner))
        in_columns = weight is not None and not weight.is_contiguous()
        self._sum(
            *(_address(gradient), _address(weight), _address(inner), rank, _address(small_A), None, out.data_ptr()),
            *(len(out), depth, out.shape[1], rank, in_columns, False, gathered is not None, *mask),
            torch.get_num_threads(),
        )
        return out


class AmxDropout(WithMask):
    """Dropout inside of the products.

    Args:
        threshold: Of the 65536 values of an element's random bits, how many drop it, 1 to 65535.
        seed: Of the mask.
        products: What computes the products of the update.
    """

    def __init__(self, threshold: int, seed: int, products: AmxProducts) -> None:
        super().__init__(products)
        self._amx, self._mask = products, (seed, threshold)
        self.scale = _LEVELS / (_LEVELS - threshold)

    @staticmethod
    def threshold_of(probability: float) -> int:
        """Of the probability of dropping an element, which it meets to 1 in 131072; 0 if it is smaller than that."""
        return min(round(probability * _LEVELS), _LEVELS - 1)

    @override
    def mask(self, shape: torch.Size, like: Tensor) -> Mask:
        lanes = torch.empty(shape, dtype=torch.int8, device="cpu")
        self._amx.library.lora_mask(lanes.data_ptr(), shape[:-1].numel(), shape[-1], *self._mask)
        return Mask.of(lanes, like)

    @override
    def project(self, x: Tensor, small_A: Tensor, factor: float = 1.0) -> Tensor:
        if factor != 1.0 or not fit_projection(x, small_A):
            return super().project(x, small_A, factor)
        return self._amx.project_kept(x, small_A, self._mask)

    @override
    def pull_back(self, pull: Pull) -> tuple[Tensor | None, Tensor | None]:
        (inner, small_A, factor), x, factor_A, to_input, gathered, base = pull
        fits = fit_update(gathered, inner, small_A) and (x is None or (len(x) == len(inner) and fit(x)))
        if factor != 1.0 or not fits:
            return super().pull_back(pull)
        grad_A = None if x is None else self._amx.gradient_of_first_kept(inner, x, factor_A, self._mask)
        if not to_input:
            return grad_A, None
        return grad_A, self._amx.sum_kept(gathered, base, (inner, small_A), self._mask)


def may_drop(like: Tensor) -> bool:
    """Whether a mask of these values can be drawn in rows of tiles."""
    return type(like) in PLAIN_TENSORS and like.dtype == torch.bfloat16 and like.shape[-1] % _WIDTH == 0


def plain(*matrices: Tensor) -> bool:
    """Whether their numbers in bf16 lie where ``data_ptr`` says, and nothing needs the derivative of a product."""
    if torch.is_grad_enabled():
        return False
    for matrix in matrices:
        if (
            type(matrix) not in PLAIN_TENSORS
            or matrix.dtype != torch.bfloat16
            or not matrix.is_cpu
            or not matrix.numel()
        ):
            return False
    return True


def fit(*matrices: Tensor) -> bool:
    """Whether tiles can be of their rows, too."""
    return plain(*matrices) and all(matrix.shape[1] % _WIDTH == 0 for matrix in matrices)


def fit_projection(x: Tensor, small_A: Tensor) -> bool:
    """Whether ``x A^T`` is a product of tiles; torch says what is wrong with one that is none at all."""
    return x.shape[1] == small_A.shape[1] and fit(x, small_A)


def fit_update(gathered: Tensor | None, inner: Tensor, small_A: Tensor) -> bool:
    """Whether ``gathered + inner A`` is a sum of tiles, in place."""
    if inner.shape[1] != len(small_A) or not fit(small_A) or not plain(inner):
        return False
    shape = len(inner), small_A.shape[1]
    return gathered is None or (gathered.shape == shape and gathered.is_contiguous() and fit(gathered))


def fit_weight(weight: Tensor) -> bool:
    """Whether tiles can be of a weight: its rows or its columns lie one after the other, and oneDNN is not as fast."""
    return weight.numel() <= _LARGEST and plain(weight) and (weight.is_contiguous() or weight.t().is_contiguous())


def _fits_base(base: Base, update: Base | None, gathered: Tensor | None) -> bool:
    """Whether ``gradient W`` is a part of the sum; torch says what is wrong with one that is no product at all."""
    gradient, weight = base
    shape = len(gradient), weight.shape[1]
    agree = gradient.shape[1] == len(weight) and (update is None or (len(update[0]), update[1].shape[1]) == shape)
    if gathered is not None:
        agree = agree and gathered.shape == shape and gathered.is_contiguous() and fit(gathered)
    return agree and fit(gradient, weight) and fit_weight(weight)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
