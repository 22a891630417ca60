"""Is a merged module still what the merge made of it? What was trained or loaded after it must not get lost."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.fingerprint import survey
from lightning_lora.layers import host_of
from lightning_lora.merging.block_sum import fold_in
from lightning_lora.originals import bits
from lightning_lora.record import MergedState, Record, find_record
from lightning_lora.targets.patterns import canonical


def base_sums(module: nn.Module, record: Record) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and checksum of every parameter of a merged module that no adapter-only file holds."""
    live = survey(module).base(record)
    return {name: (p.dtype, found) for (name, p), found in zip(live.items(), _checksums(live.values()), strict=True)}


def changed_since_merge(module: nn.Module) -> set[str]:
    """Parameters of the base of a merged module that are not what the merge left: changed, new or gone.

    A merged weight that was cast meanwhile is compared with the merge done again and cast; another parameter that was
    cast counts as changed, as nothing is kept to compare it with.
    """
    record = find_record(module)
    assert record is not None
    assert record.merged is not None
    merged, live = record.merged, survey(module).base(record)
    layers = {weight_of(name): name for name in merged.weights or ()}
    known = [name for name in live if name in merged.sums]
    of_same_dtype = [name for name in known if live[name].dtype == merged.sums[name][0]]
    sums = dict(zip(of_same_dtype, _checksums(live[name] for name in of_same_dtype), strict=True))
    changed = set(live) ^ set(merged.sums)
    for name in known:
        if name in sums:
            same = sums[name] == merged.sums[name][1]
        else:
            same = name in layers and _is_merge_cast(module, merged, layers[name], live[name])
        if not same:
            changed.add(name)
    return changed


def _is_merge_cast(module: nn.Module, merged: MergedState, name: str, weight: Tensor) -> bool:
    assert merged.weights is not None
    layer = {canonical(key): child for key, child in module.named_modules()}[canonical(name)]
    host = host_of(layer)
    if host is None:
        return False
    base = merged.weights[name].matrix_for(layer)
    adapters = merged.adapters.get(name, nn.ModuleDict()).to(base.device)
    active = [cast(Adapter, adapters[key]) for key in merged.active.get(name, ())]
    matrix = host.as_weight(fold_in(active, base, merged.sums[weight_of(name)][0]))
    return matrix.shape == weight.shape and torch.equal(matrix.to(weight.dtype), weight.detach().to(base.device))


def weight_of(layer: str) -> str:
    """Canonical name of the weight of the layer called ``layer``."""
    return canonical(f"{layer}.weight" if layer else "weight")


def _checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Of each tensor, side by side on a CPU: zlib lets other threads run meanwhile."""
    waiting = list(tensors)
    if not all(tensor.is_cpu for tensor in waiting):  # each is copied, on the stream of this thread
        return [_checksum(tensor) for tensor in waiting]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(_checksum, waiting))


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes; 0 for a tensor without data."""
    return 0 if tensor.is_meta or tensor.numel() == 0 else zlib.crc32(bits(tensor).numpy())  # type: ignore[arg-type]
