"""The callback: Trainer hooks onto flat tensors."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.flat.optimizer import FlatGroups
from lightning_lora.guards import holds_whole_parameters
from lightning_lora.lightning_names import is_a

_ELEMENTWISE = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


class FlatOptimizer(pl.Callback):
    """Let the optimizer of a fit step one tensor with the values of all trained parameters, in place of hundreds.

    Gradients are accumulated in one tensor as well: its norm is taken, it is clipped and set to zero at once. That
    pays where the time of a step goes into its many small operations: on a CPU, with a small model and a low rank.
    Checkpoints are those of a run without the callback and resume with it and without; the values are the same up to
    the rounding of sums (the norm of all gradients), so a bitwise resume needs the callback in both runs. Memory:
    gradients stay between steps.

    Code that looks at the parameters in the optimizer's groups, such as a hook that changes each by its own norm, sees
    one tensor. A parameter that gets no gradient in a step, while others do, must not move: then the rest of the run
    goes on without flat tensors, with a warning.

    Args:
        elementwise: Says of an optimizer that is not torch's own, such as Lion, that it treats each value by itself.
            What looks at a whole tensor, such as its norm (LAMB) or its rows (Adafactor, Muon), would take other steps.

    Raises:
        UnsupportedSetupError: When the training starts, for an optimizer of which that is not known, more than one
            optimizer, manual optimization, a ``configure_gradient_clipping`` of the module's own, a GradScaler, and
            strategies other than one device and DDP.
    """

    def __init__(self, *, elementwise: bool = False) -> None:
        self.elementwise = elementwise
        self._groups: FlatGroups | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.optimizers:
            why = _why_not(trainer, pl_module) or _why_not_optimizer(trainer.optimizers[0], self.elementwise)
            if why is not None:
                raise UnsupportedSetupError(f"FlatOptimizer: {why}. Leave the callback out.")
            names = {id(parameter): repr(name) for name, parameter in pl_module.named_parameters()}
            self._groups = FlatGroups(
                trainer.optimizers[0],
                why_not=lambda parameter: _warn(names.get(id(parameter), "a tensor outside of the module")),
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._groups is not None:
            self._groups.gather()  # before the clipping, which looks at what the optimizer holds

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._groups is not None:
            self._groups.release()
            self._groups = None


def _why_not(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, FlatOptimizer) for callback in callbacks) > 1:
        return "there are two of it"
    if not holds_whole_parameters(trainer):
        return f"{type(trainer.strategy).__name__} holds parameters in a way of its own"
    if not module.automatic_optimization:
        return f"{type(module).__name__} steps its optimizers itself (automatic_optimization=False)"
    if type(module).configure_gradient_clipping is not pl.LightningModule.configure_gradient_clipping:
        return f"{type(module).__name__} has its own configure_gradient_clipping, which may clip each tensor by itself"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return f'precision="{trainer.precision}" scales gradients and looks at each of them'
    return None


def _why_not_optimizer(optimizer: Optimizer, elementwise: bool) -> str | None:
    kind = type(optimizer)
    if is_a(optimizer, "Optimizer8bit"):  # the root of bitsandbytes' optimizers
        return f"{kind.__name__} keeps its state in blocks of values of one tensor"
    if kind not in _ELEMENTWISE and not elementwise:
        return (
            f"whether {kind.__name__} treats each value by itself is not known. If it does, say so: "
            "FlatOptimizer(elementwise=True)"
        )
    if kind.zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        return f"{kind.__name__} has a zero_grad of its own"
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if not parameter.dim() or not parameter.is_floating_point():
            return "a parameter is a single number, or not of floating point"
    return None


def _warn(name: str) -> None:
    rank_zero_warn(
        f"FlatOptimizer: {name} got no gradient in a step in which others did, so the rest of the run steps each "
        "tensor by itself, as without the callback."
    )
