"""From a batch to a loss, as a training step does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.planning.batches import TokenBatch, is_mapping

Step = Callable[[nn.Module, Any], Any]


def step_for(module: nn.Module, batch: Any) -> Step:
    """The step that a module and a batch suggest, if the caller gives none.

    A LightningModule (whatever has a ``training_step``) takes its own; a model that returns a loss (transformers) is
    called with the batch; a language model that returns logits ``(size, length, vocabulary)`` gets cross entropy on a
    :class:`TokenBatch`; of any other module the mean of the outputs is the loss.
    """
    if callable(getattr(module, "training_step", None)):
        return training_step
    return logits_step if isinstance(batch, TokenBatch) and not _takes(module, "labels") else call_step


def training_step(module: nn.Module, batch: Any) -> Any:
    """``LightningModule.training_step``, without a Trainer."""
    step: Any = module.training_step
    return step(batch, 0) if _arguments(step) > 1 else step(batch)


def call_step(module: nn.Module, batch: Any) -> Any:
    """Call the module: a dict by names, a tuple or list by position, anything else as the one input."""
    if is_mapping(batch):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def logits_step(module: nn.Module, batch: Any) -> Any:
    """Cross entropy of a language model's logits."""
    logits = module(batch["input_ids"])
    return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())


def loss_of(output: Any) -> Tensor:
    """The loss in what a step returned: itself, its ``loss``, or the mean of all floating-point outputs.

    Raises:
        UnsupportedSetupError: If there is nothing that a backward pass could start from.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if loss is None or not isinstance(loss, Tensor):
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        loss = sum(tensor.float().mean() for tensor in tensors) if tensors else None
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise UnsupportedSetupError(
            "plan_memory: the step returned no loss with a gradient. Pass step=lambda module, batch: <the loss>."
        )
    return loss if loss.ndim == 0 else loss.float().mean()


def _arguments(function: Any) -> int:
    import inspect

    return len(inspect.signature(function).parameters)


def _takes(module: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(module.forward).parameters
