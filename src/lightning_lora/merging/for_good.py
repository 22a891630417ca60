"""A merge that keeps nothing: of a dense base in the memory of one layer, and no way back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.dense_models import declare_dense
from lightning_lora.errors import LightningLoRAError
from lightning_lora.injection import thaw
from lightning_lora.kept_weights import replace_weight
from lightning_lora.layers import detach_adapters, reattach_adapters
from lightning_lora.merging.config import MergeConfig
from lightning_lora.merging.proof import MergedWeight, measure_merge, merged_weights, plain_weights
from lightning_lora.merging.report import MergeReport
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import MergedState, Record


def merge_for_good(module: nn.Module, record: Record, config: MergeConfig) -> MergeReport:
    """Prove the merge of all layers, then fold them one after the other, each in the place of its base weight.

    A layer that is folded and one that is not yet compute the same. So what an error leaves (out of memory, where
    quantized weights become dense) computes what it did, and merging again goes on with the rest.

    Raises:
        MergeError: If the result would not be right; nothing is changed then.
        LightningLoRAError: If the folding was stopped.
    """
    report = measure_merge(module, config)
    becomes_dense = config.base != "requantized" and any(isinstance(c, QuantizedLayer) for c in module.modules())
    with _interrupt_held_back():
        try:
            if becomes_dense:  # first: as long as this is not done, there are adapters to merge again
                for _, plain, dense in plain_weights(module, config):
                    replace_weight(plain, dense)
            for weight in merged_weights(module, config):
                _fold(weight)
        except Exception as error:  # above all, no memory for one more dense weight
            raise LightningLoRAError(
                f"The merge was stopped ({type(error).__name__}: {error}). With keep_base=False the layers that it "
                "reached are merged for good; the others have live adapters, and the module computes what it did. "
                "Free memory and merge again. A checkpoint of it now would lack the merged adapters."
            ) from error
        if becomes_dense:
            declare_dense(module)
        record.merged = MergedState(weights=None)
        thaw(module, record)
    return report


def _fold(weight: MergedWeight) -> None:
    layer, active = weight.layer, weight.layer.active
    adapters = detach_adapters(layer)
    try:
        weight.put_in()
    except Exception:
        reattach_adapters(layer, adapters, active)
        raise


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C waits until the context ends: between a layer's adapters and its merged weight there is no way back."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # where alone Python raises it
    previous = signal.getsignal(signal.SIGINT)
    if not in_main_thread or previous is None:  # a handler that Python did not set can't be put back
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
