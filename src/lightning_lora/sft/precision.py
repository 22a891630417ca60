"""Whether bfloat16 arithmetic is worth while on a device."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes bfloat16 in hardware: a recent GPU, a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Private in torch 2.6 to 2.13 and without a public twin; where they are missing, fp32 is the safe
        # answer.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)
    return False
