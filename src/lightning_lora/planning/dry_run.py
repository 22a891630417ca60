"""One training step on tensors without memory: the real code runs forward and backward, and each storage is counted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_lora.adapter import Adapter
from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.frozen_layer import FrozenLayer
from lightning_lora.fused.cast_copy import CastCopy, may_keep
from lightning_lora.fused.draw import fixed_seed
from lightning_lora.gradient_checkpointing.repeated import repeated_blocks
from lightning_lora.planning.batches import example_of
from lightning_lora.planning.codes import coded_layers
from lightning_lora.planning.liveness import LiveBytes
from lightning_lora.planning.precision import Precision
from lightning_lora.planning.steps import Step, loss_of
from lightning_lora.planning.twin import become_weightless
from lightning_lora.planning.weightless import LARGEST_KNOWN, WeightlessTensor, without_memory

# What live bytes are counted as.
BATCH = "batch"
ACTIVATIONS = "activations"
HEAD = "logits and loss"
GRADIENTS = "gradients"
DEQUANTIZED = "dequantized weights"
TEMPORARY = "backward temporaries"


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step beside what is there all the time (weights, adapters, optimizer state).

    Attributes:
        kept: Alive when the forward pass has ended, waiting for the backward pass; without the batch and what stays.
        forward: Alive at the peak of the forward pass, by part.
        backward: Alive at the peak of the backward pass, by part; empty if there was none.
        casts: Of weights cast for autocast, which stay from step to step; not in the parts above.
        unknown_reads: How often the step asked for a floating-point number, as ``loss.item()`` does, and got NaN.
    """

    kept: int
    forward: Mapping[str, int]
    backward: Mapping[str, int]
    casts: int = 0
    unknown_reads: int = 0


def dry_run(
    twin: nn.Module,
    batch: Any,
    *,
    step: Step,
    precision: Precision,
    accumulate: bool = False,
    backward: bool = True,
) -> StepMemory:
    """Run one step of a module without memory.

    Args:
        twin: On the meta device, with its adapters; gets fake tensors. In the modes in which it trains: Lightning
            leaves them as they are, but for the adapters, which the callback puts into training mode.
        batch: A :class:`~lightning_lora.planning.batches.TokenBatch` or an example.
        step: From module and batch to what a training step returns.
        precision: Of the run.
        accumulate: Whether gradients of an earlier batch are there already.
        backward: False stops when the forward pass has ended.

    Raises:
        UnsupportedSetupError: If the code needs to look at values that no one knows before the run, or fails.
    """
    batch = weightless(example_of(batch, precision.cast))
    become_weightless(twin)
    for child in twin.modules():
        if isinstance(child, Adapter):
            child.train()
    known = [*twin.parameters(), *twin.buffers()]
    with warnings.catch_warnings(), fixed_seed(0), without_memory(), LiveBytes(known) as live:
        warnings.simplefilter("ignore")  # advice for real runs, such as that of self.log without a Trainer
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor):
                live.count(leaf, BATCH)
        try:
            # oneDNN's LSTM hands autograd a workspace that has no size on the meta device; a GPU runs another one.
            with torch.backends.mkldnn.flags(enabled=False):
                return _Run(twin, live, precision)(batch, step, accumulate=accumulate, backward=backward)
        except Exception as error:  # the user's code may fail in any way where there are no values and no Trainer
            what = str(error) if isinstance(error, UnsupportedSetupError) else f"{type(error).__name__}: {error}"
            raise UnsupportedSetupError(
                f"plan_memory can't run a step of {type(twin).__name__} without values: {what}. Pass step=, a step "
                "that computes the loss alone, or a module without the part that looks at values."
            ) from error


class _Run:
    """Says to what part the bytes belong while the step goes on."""

    def __init__(self, twin: nn.Module, live: LiveBytes, precision: Precision) -> None:
        self._twin, self._live, self._precision = twin, live, precision
        self._in_backward = False
        self._has_blocks = False
        for _, block in repeated_blocks(twin):
            block.register_forward_pre_hook(lambda *_: self._enter(ACTIVATIONS))
            block.register_forward_hook(self._leave_block)
        for layer in coded_layers(twin):
            layer.note = self._dequantized
        for child in twin.modules():
            if isinstance(child, FrozenLayer):
                child.cast_copy = _CountedCast(live)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count_gradient)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any, step: Step, *, accumulate: bool, backward: bool) -> StepMemory:
        live = self._live
        if accumulate:
            self._fill_gradients()
        live.part = ACTIVATIONS
        with self._precision.forward():
            loss = loss_of(step(self._twin, batch))
        kept = live.total - live.current[BATCH] - live.current[GRADIENTS]
        forward = live.take_peak()
        if backward:
            self._in_backward = True
            live.part = HEAD if self._has_blocks else TEMPORARY
            loss.backward()  # type: ignore[no-untyped-call]
        parts = live.take_peak() if backward else {}
        return StepMemory(kept, forward, parts, casts=live.left_out, unknown_reads=live.unknown_reads)

    def _enter(self, part: str) -> None:
        if not self._in_backward:
            self._live.part = part

    def _leave_block(self, module: nn.Module, args: Any, output: Any) -> None:
        """What comes after the last block is the head; in the backward pass, what comes before it."""
        self._enter(HEAD)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not self._in_backward:
                self._has_blocks = True
                leaf.register_hook(self._reach_blocks)  # type: ignore[no-untyped-call]

    def _reach_blocks(self, gradient: Tensor) -> None:
        self._live.part = TEMPORARY

    def _dequantized(self, dense: Tensor) -> Tensor:
        self._live.count(dense, DEQUANTIZED)
        return dense

    def _count_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._live.count(parameter.grad, GRADIENTS)

    def _fill_gradients(self) -> None:
        self._live.part = GRADIENTS
        for parameter in self._twin.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)


class _CountedCast(CastCopy):
    """What it keeps is there from step to step: also before the layer is called."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    @override
    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        self._live.leaves_out = may_keep()
        try:
            return super().of(weight, dtype)
        finally:
            self._live.leaves_out = False


def weightless(example: Any) -> Any:
    """The batch without memory; its integers keep their values."""
    seen: dict[int, Tensor] = {}

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            value = None if leaf.is_meta or leaf.numel() > LARGEST_KNOWN else leaf
            seen[id(leaf)] = WeightlessTensor(torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), value)
        return seen[id(leaf)]

    return pytree.tree_map(convert, example)
