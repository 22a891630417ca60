"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapter import ALL_ROWS, Adapter
from lightning_lora.config import AdapterConfig
from lightning_lora.functional import low_rank_update, low_rank_weight
from lightning_lora.fused import KERNELS, Frozen, Joint, follow, lead, lora_linear, prepare_kernels, siblings
from lightning_lora.layers import AdaptedLayer

INITS = ("kaiming", "gaussian")
_MOST_JOINED = 128  # ranks in one product: of a guess that is wrong, not much is lost


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """LoRA: ``h = W0 x + scaling * B A x`` with ``W0`` frozen, ``A`` random and ``B`` zero at the start.

    ``scaling`` is ``alpha / rank`` (Hu et al. 2021, section 4.1), or ``alpha / sqrt(rank)`` when ``rank_stabilized``
    (Kalajdzievski 2023, arXiv:2312.03732, eq. 7). See :class:`~lightning_lora.config.AdapterConfig` for the fields
    that choose the layers.

    Attributes:
        dropout: Probability of dropping an element of the input of the update, in ``[0, 1)``. Layers of one parent that
            get the very same input, such as q, k and v, drop the same of it, as one layer in their place would.
        rank_stabilized: Scale by ``alpha / sqrt(rank)``.
        init: Of ``A``: ``"kaiming"`` (uniform within ``1 / sqrt(in_features)``, as the reference implementation) or
            ``"gaussian"`` (normal with standard deviation ``1 / rank``).
        kernels: What computes the products: ``"torch"``, its own operations (for bf16 and fp16 in fp32 on an x86 CPU
            without instructions for those); ``"triton"``, kernels for those with dropout, in which the mask never
            reaches memory, on CUDA; ``"amx"``, on a CPU with these instructions (Xeons since 2023) those in bf16 whose
            features are multiples of 32, compiled by g++ where it runs. Each acts where it can and is faster, else
            torch's operations do, and draws another mask from the same seed.

    Raises:
        ValueError: For a value that has no meaning; the message names the field.
        MissingDependencyError: When adapters are made, if the kernels can't be compiled.

    Example:
        >>> LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"]).scaling_of(rank=4, alpha=16.0)
        4.0
    """

    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "kaiming"
    kernels: str = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}.")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {self.init!r}.")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels must be one of {', '.join(KERNELS)}; got {self.kernels!r}.")
        if not isinstance(self.rank_stabilized, bool):
            raise ValueError(f"rank_stabilized must be True or False, got {self.rank_stabilized!r}.")

    @property
    @override
    def kind(self) -> str:
        return "lora"

    def scaling_of(self, *, rank: int, alpha: float) -> float:
        """The factor of the update of a layer with this rank and alpha."""
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    @override
    def make_adapter(self, layer: nn.Module, *, layer_name: str, rank: int, alpha: float) -> LoRAAdapter:
        assert isinstance(layer, AdaptedLayer)
        prepare_kernels(self.kernels, layer.weight.device)
        adapter = LoRAAdapter(
            *layer.matrix_shape,
            rank=rank,
            alpha=alpha,
            scaling=self.scaling_of(rank=rank, alpha=alpha),
            dropout=float(self.dropout),
            kernels=self.kernels,
            like=layer.weight,
        )
        adapter.reset_parameters(self.init, seed=_seed_of(self.seed, layer_name))
        return adapter


class LoRAAdapter(Adapter):
    """The pair ``lora_A`` ``(rank, in_features)`` and ``lora_B`` ``(out_features, rank)`` of one layer.

    Both are fp32 (fp64 beside an fp64 base) and bare parameters, so that nothing that replaces ``nn.Linear`` in a
    module finds them.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int,
        alpha: float,
        scaling: float,
        dropout: float,
        kernels: str,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scaling, self.dropout, self.kernels = rank, alpha, scaling, dropout, kernels
        dtype = torch.promote_types(torch.float32, like.dtype) if like.is_floating_point() else torch.float32
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=like.device))

    @torch.no_grad()
    def reset_parameters(self, init: str, *, seed: int) -> None:
        """Draw ``lora_A`` from a generator of its own and set ``lora_B`` to zero."""
        self._init, self._seed = init, seed
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        # Drawn on the CPU from a generator of its own: the same on every rank and device, and the user's stream of
        # random numbers goes on as if nothing had been injected.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype, device="cpu")
        if init == "gaussian":
            drawn.normal_(0.0, 1.0 / self.rank, generator=generator)
        else:
            bound = 1.0 / math.sqrt(max(1, drawn.shape[1]))
            drawn.uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        had_values = not self.lora_A.is_meta
        super()._apply(fn, recurse)
        if not had_values and not self.lora_A.is_meta:  # to_empty() allocates whatever was in the memory
            self.reset_parameters(self._init, seed=self._seed)
        return self

    @override
    def adapt(self, input: Tensor, base_output: Tensor) -> Tensor:
        return low_rank_update(
            input,
            base_output,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            dropout=self.dropout,
            training=self.training,
        )

    @override
    def adapt_linear(
        self,
        input: Tensor,
        dtype: torch.dtype,
        frozen: Frozen,
        *,
        joint: Joint | None = None,
        partners: Iterable[Adapter] = (),
    ) -> tuple[Tensor, Joint | None]:
        dropout = self.dropout if self.training else 0.0
        lora_A, lora_B = self.lora_A, self.lora_B  # read once: a parametrization makes a new tensor each time
        own = None if joint is None else joint.part_of(lora_A, scaling=self.scaling, dropout=dropout)
        if joint is not None and own is not None:
            return follow(joint, own, frozen, lora_B)
        given = input.to(dtype)
        options: Any = {"dropout": dropout, "kernels": self.kernels}
        others = list(self._joining(partners)) if siblings.may_share(dropout) else []
        if not others:
            return lora_linear(given, frozen, lora_A, lora_B, scaling=self.scaling, **options), None
        joined = [lora_A, *(other.lora_A for other in others)]
        scalings = [self.scaling, *(other.scaling for other in others)]
        return lead(given, frozen, joined, lora_B, scalings=scalings, **options)

    def _joining(self, partners: Iterable[Adapter]) -> Iterator[LoRAAdapter]:
        """Others with whose A there can be one product."""
        rank, kind = self.rank, self._kind_of_product
        for partner in partners:
            if kind is not None and isinstance(partner, LoRAAdapter) and partner._kind_of_product == kind:
                rank += partner.rank
                if rank <= _MOST_JOINED:
                    yield partner

    @property
    def _kind_of_product(self) -> tuple[object, ...] | None:
        A = self._parameters.get("lora_A")
        if A is None:
            return None
        return type(A), A.dtype, A.device, A.shape[1:], A.requires_grad, self.dropout, self.training, self.kernels

    @override
    def weight_update(self, weight: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        return low_rank_weight(self.lora_A, self.lora_B[rows], scaling=self.scaling, dtype=weight.dtype)

    @override
    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def _seed_of(seed: int, layer_name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{layer_name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")  # Python's own hash() of a string differs from process to process
