"""One training step of a variant: what is timed, and the proof that two variants compute the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import memory, models, peers
from lightning_lora.frozen_layer import drop_cast_copies
from lightning_lora.optimizers import fuse_adamw

# Relative difference of the adapters' gradients (and of the loss) above which two variants are not taken for
# the same computation. In bf16 every product is rounded to 8 bits, in another order for each implementation.
AGREEMENT = {"fp32": 1e-4, "bf16": 0.05, "bf16-mixed": 0.05}


@dataclass
class TrainingStep:
    """One forward and backward pass, and the optimizer's part if it has one."""

    model: nn.Module
    inputs: dict[str, Tensor]
    autocast: bool
    optimizer: torch.optim.Optimizer | None = None

    def forward(self) -> Tensor:
        """The model's own loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(**self.inputs).loss

    def clear(self) -> None:
        """Drop the gradients, as ``zero_grad(set_to_none=True)`` does."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def __call__(self) -> None:
        self.clear()
        self.forward().backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trainable(self.model), 1.0)
            self.optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_step(model: nn.Module, case: models.Case, *, optimizer: bool) -> TrainingStep:
    """The timed callable of one variant, with AdamW as torch makes it; ours has what the callback makes of it."""
    parameters = trainable(model)
    adam = torch.optim.AdamW(parameters, lr=1e-5) if optimizer and parameters else None
    if adam is not None and models.our_adapters(model):
        fuse_adamw([adam])
    return TrainingStep(model, case.inputs(), case.precision == "bf16-mixed", adam)


def agreement(ours: TrainingStep, theirs: TrainingStep, *, precision: str) -> dict[str, float]:
    """Relative difference of losses and of adapter gradients, dropout off.

    Raises:
        RuntimeError: If the difference is above ``AGREEMENT``: a ratio of their times would mean nothing.
    """
    our_loss, our_gradient = _loss_and_gradient(ours)
    loss, gradient = _loss_and_gradient(theirs)
    found = {
        "loss": abs(our_loss - loss) / abs(loss),
        "gradients": ((our_gradient - gradient).norm() / gradient.norm()).item(),
    }
    if max(found.values()) > AGREEMENT[precision]:
        raise RuntimeError(f"ours and PEFT compute different things in {precision}, relatively: {found}")
    return found


def _loss_and_gradient(step: TrainingStep) -> tuple[float, Tensor]:
    """Loss, and the gradients of every A and B in one vector in the order of their names."""
    step.model.eval()
    step.clear()
    loss = step.forward()
    loss.backward()
    step.model.train()
    adapters = models.our_adapters(step.model) or models.peft_adapters(step.model) or peers.adapters(step.model)
    return loss.item(), torch.cat([adapters[key].grad.float().flatten() for key in sorted(adapters)])


def measure_memory(step: TrainingStep) -> dict[str, int]:
    """Saved, peak and trainable bytes of one variant."""
    step()  # optimizer state exists from here on
    step.clear()
    drop_cast_copies(step.model)  # ours keeps them from step to step: they count where they are made
    peak = memory.peak_bytes(step)
    step.clear()
    return {
        "saved_bytes": saved_bytes(step),
        "peak_bytes": peak,
        "trainable_bytes": sum(p.numel() * p.element_size() for p in trainable(step.model)),
    }


def saved_bytes(step: TrainingStep) -> int:
    """What a forward pass leaves for the backward pass; a first one has made what models keep.

    Not by hooks on what is saved: ours lets them decide about its inputs, and gives these up itself only without.
    """
    drop_cast_copies(step.model)
    _, saved = memory.alive_bytes(step.forward)
    return saved
