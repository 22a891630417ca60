"""The memory of a fit: what one of its batches should take, by a plan, beside what it took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_lora.device_memory import PeakMeter
from lightning_lora.frozen_layer import FrozenLayer
from lightning_lora.planning.memory_plan import MemoryPlan
from lightning_lora.planning.plan import plan_memory
from lightning_lora.planning.units import in_gb
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.tracking import log_memory

log = logging.getLogger(__name__)


class MemoryLog:
    """Plans and measures the first batch that finds an optimizer with its states, up to the end of its step.

    Attributes:
        plan: Of that batch; None before it, or where none could be made.
    """

    def __init__(self) -> None:
        self.plan: MemoryPlan | None = None
        self._meter: PeakMeter | None = None
        self._until = 0
        self._done = False

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Before a batch: plan it and begin to measure, if its turn has come."""
        if self._done or not any(optimizer.state for optimizer in trainer.optimizers):
            return
        self._done, self._until = True, trainer.global_step + 1
        self.plan = _plan(trainer, module, batch)
        self._meter = PeakMeter(module.device)
        self._meter.start(_held(trainer, module, batch))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """After a batch: log both peaks, if its step was the one."""
        if self._meter is None or trainer.global_step < self._until:
            return
        planned, measured = None if self.plan is None else self.plan.peak, self._meter.stop()
        self._meter = None
        log_memory(trainer, planned=planned, measured=measured)
        if planned is not None and measured is not None:
            log.info("Peak of a batch: planned %s, measured %s", in_gb(planned), in_gb(measured))

    def abandon(self) -> None:
        """Stop measuring, where the run ends before the step does."""
        if self._meter is not None:
            self._meter.stop()
            self._meter = None


def _held(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Iterator[Tensor]:
    """Tensors that are there before the batch is trained on."""
    for parameter in module.parameters():
        yield from (tensor for tensor in (parameter, parameter.grad) if tensor is not None)
    yield from module.buffers()
    for child in module.modules():
        if isinstance(child, QuantizedLayer):
            yield from child.constants().values()
        if isinstance(child, FrozenLayer) and child.cast_copy is not None and child.cast_copy.kept is not None:
            yield child.cast_copy.kept
    leaves = pytree.tree_leaves([batch, *(dict(optimizer.state) for optimizer in trainer.optimizers)])
    yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _plan(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> MemoryPlan | None:
    (optimizer,) = trainer.optimizers if len(trainer.optimizers) == 1 else (None,)
    try:
        if optimizer is None:
            raise ValueError(f"a plan is of one optimizer, and there are {len(trainer.optimizers)}.")
        with isolate_rng():  # the step may draw numbers of Python or numpy
            return plan_memory(
                module,
                None,
                batch=batch,
                optimizer=optimizer,
                precision=str(trainer.precision),
                accumulate_grad_batches=trainer.accumulate_grad_batches,
            )
    except Exception as error:  # the user's step may fail in any way on a copy without values: the fit goes on
        log.info("No plan of this fit's memory: %s", error)
        return None
