"""The arithmetic of a low-rank update: the one place that forward and backward go through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_update(
    input: Tensor,
    base_output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Add a low-rank update to the output of a frozen linear layer.

    ``base_output + scaling * dropout(input) @ lora_A.T @ lora_B.T`` (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

    The products run in the dtype of ``input`` (under autocast: in autocast's dtype); ``lora_A`` and ``lora_B`` stay
    fp32 and are cast, not the activations, so that a bf16 model never holds fp32 copies of its activations and the
    gradients of the adapters still arrive in fp32. The scaling is folded into the small ``lora_B``.

    Args:
        input: Input of the layer, ``(..., in_features)``.
        base_output: Output of the frozen layer, ``(..., out_features)``.
        lora_A: ``(rank, in_features)``.
        lora_B: ``(out_features, rank)``.
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` when rank-stabilised.
        dropout: Probability of dropping an element of the input of the update.
        training: Whether dropout acts.

    Returns:
        ``(..., out_features)`` in the dtype of ``base_output``.

    Example:
        >>> x, A, B = torch.ones(1, 3), torch.ones(2, 3), torch.ones(4, 2)
        >>> low_rank_update(x, torch.zeros(1, 4), A, B, scaling=0.5)
        tensor([[3., 3., 3., 3.]])
    """
    if dropout > 0.0 and training:
        input = F.dropout(input, dropout, training=True)
    hidden = F.linear(input, lora_A.to(input.dtype))
    update = F.linear(hidden, (lora_B * scaling).to(hidden.dtype))
    return base_output + update.to(base_output.dtype)


def low_rank_weight(lora_A: Tensor, lora_B: Tensor, *, scaling: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense update ``scaling * lora_B @ lora_A``, ``(out_features, in_features)``, in ``dtype``.

    Args:
        lora_A: ``(rank, in_features)``.
        lora_B: ``(out_features, rank)``.
        scaling: As in :func:`low_rank_update`.
        dtype: Of the product and the result.
    """
    with torch.autocast(device_type=lora_A.device.type, enabled=False):
        return (lora_B.to(dtype) * scaling) @ lora_A.to(dtype)
