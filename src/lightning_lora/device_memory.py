"""The most bytes that tensors held during a step, as torch's allocators tell it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class PeakMeter:
    """Measures between :meth:`start` and :meth:`stop`, on CUDA and on a CPU.

    On CUDA the peak statistics of the device are reset. On a CPU torch's profiler records every allocation, so what
    runs meanwhile is slower.

    Args:
        device: Of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profiler: Any = None
        self._held = 0

    def start(self, held: Iterable[Tensor]) -> None:
        """Begin; ``held`` is what is there already, which no record of a CPU's allocations tells."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._device.type == "cpu" and not torch.autograd.profiler._is_profiler_enabled:  # there can be one only
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
            self._held = sum(storages.values())
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()

    def stop(self) -> int | None:
        """Most bytes that tensors held since the start; None where that can't be told."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        current = peak = 0
        for change in allocations(profiler):
            current += change
            peak = max(peak, current)
        return self._held + peak


def allocations(profiler: Any) -> Iterator[int]:
    """Bytes of every allocation (positive) and release (negative) that a profiler recorded, in the order of time."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
