"""What a training step holds in memory: bytes saved for the backward pass, and the peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward``.

    Every storage counts once, at its full size, however many nodes or views saved it.

    Limits: tensors that a custom ``autograd.Function`` puts on its context without ``save_for_backward`` pass
    these hooks by, and so do integers and Python objects. ``peak_bytes`` sees them.

    Args:
        forward: Builds the graph. Its result is dropped.
        exclude: Tensors that exist anyway: parameters, buffers, the batch.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # Holding the storages keeps their addresses from being handed out a second time while we count.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Detached, since an output saved by its own node would otherwise hold that node, and so itself, for ever.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """Largest number of bytes alive at once during ``step``, above what was alive before it.

    Read from the profiler's record of every allocation and release in torch's CPU allocator.

    Limits: scratch memory that oneDNN or MKL take by themselves, Python objects and the allocator's own
    rounding are not seen, and memory freed in ``step`` but taken before it lowers the count: clear gradients
    before measuring a step that would clear them first.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
        del result
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    if not records:
        raise RuntimeError("peak_bytes: the profiler recorded no allocation, this torch build reports none")
    current = peak = 0
    for record in records:
        current += record.nbytes()
        peak = max(peak, current)
    return peak
