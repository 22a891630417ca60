"""A merge that keeps nothing: the memory of one layer beside the module, and no way back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.dense_models import declare_dense
from lightning_lora.injection import thaw
from lightning_lora.kept_weights import replace_codes, replace_weight
from lightning_lora.layers import detach_adapters
from lightning_lora.merge_config import MergeConfig
from lightning_lora.merge_proof import measure_merge, merged_weights, plain_weights
from lightning_lora.merge_report import MergeReport
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import MergedState, Record


def merge_for_good(module: nn.Module, record: Record, config: MergeConfig) -> MergeReport:
    """Prove the merge of all layers, then fold them one after the other, each in the place of its base weight.

    A layer that is folded and one that is not yet compute the same, so what an error leaves (out of memory, where
    quantized weights become dense) computes what it did, and merging again goes on with the rest.

    Raises:
        MergeError: If the result would not be right; nothing is changed then.
    """
    report = measure_merge(module, config)
    becomes_dense = config.base != "requantized" and any(isinstance(c, QuantizedLayer) for c in module.modules())
    with _interrupt_held_back():
        for _, layer, stored, codes in merged_weights(module, config):
            detach_adapters(layer)
            if codes is None:
                replace_weight(layer, stored)
            else:
                replace_codes(layer, codes)
        if becomes_dense:
            for _, plain, dense in plain_weights(module, config):
                replace_weight(plain, dense)
            declare_dense(module)
        record.merged = MergedState(weights=None)
        thaw(module, record)
    return report


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C waits until the context ends: between a layer's adapters and its merged weight there is no way back."""
    if threading.current_thread() is not threading.main_thread():  # where Python raises no KeyboardInterrupt
        yield
        return
    held: list[tuple[int, Any]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[0])
