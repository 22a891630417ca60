"""What a device says of the most memory that was in use: torch's allocator on a GPU, the system on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

_PROCESS = Path("/proc/self")  # Linux


def forget_peak(device: torch.device) -> None:
    """Look for a new peak from now on; elsewhere than on CUDA and on Linux nothing is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and (_PROCESS / "clear_refs").exists():
        (_PROCESS / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes in use since :func:`forget_peak`; None where nothing is measured.

    On CUDA those that tensors hold; on a CPU the resident memory of the process, Python and its libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and (_PROCESS / "status").exists():
        lines = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return None
