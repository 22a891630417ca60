"""liger-kernel's kernels for what a transformers model computes beside its linear layers, as one callback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_lora.errors import MissingDependencyError, UnsupportedSetupError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LigerKernels(pl.Callback):
    """Replaces norms, rotary embeddings, gated activations and the loss of transformers models by liger-kernel's.

    They act on a GPU (https://github.com/linkedin/Liger-Kernel). Adapters and what is saved stay as they are; values
    change in their last bits. The function for rotary embeddings is replaced in transformers' own module, so that other
    models of the type in the process get it, too.

    Args:
        choices: Passed on to liger-kernel's function for the model's type, such as ``rope=False``.

    Raises:
        MissingDependencyError: In ``setup``, if liger-kernel is not installed.
        UnsupportedSetupError: In ``setup``, if the module holds no transformers model, one of a type that liger-kernel
            does not know, or trains on something else than a GPU.
    """

    def __init__(self, **choices: bool) -> None:
        self.choices = choices

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            raise UnsupportedSetupError(
                f"LigerKernels: liger-kernel's kernels run on a GPU, and the Trainer uses {device}. "
                "Leave the callback out."
            )
        use_liger_kernels(pl_module, **self.choices)


def use_liger_kernels(module: nn.Module, **choices: bool) -> list[str]:
    """Put liger-kernel's kernels into the transformers models in ``module``, and return the types of those models.

    A second call changes nothing: liger-kernel replaces methods, and wraps none.

    Raises:
        MissingDependencyError: If liger-kernel is not installed.
        UnsupportedSetupError: If there is no transformers model, or one of a type that liger-kernel does not know.
    """
    try:
        from liger_kernel.transformers import monkey_patch
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "LigerKernels: liger-kernel is not installed. `pip install liger-kernel`, or leave the callback out."
        ) from error
    models = _outermost_models(module)
    if not models:
        raise UnsupportedSetupError(
            f"LigerKernels: {type(module).__name__} holds no transformers model, so there is nothing to speed up. "
            "Leave the callback out, or build the model in __init__."
        )
    known: dict[str, Any] = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    types = [str(model.config.model_type) for model in models]
    unknown = [type_ for type_ in types if type_ not in known]
    if unknown:  # of which liger-kernel itself says so in a log line, and does nothing
        raise UnsupportedSetupError(
            f"LigerKernels: liger-kernel has no kernels for {', '.join(unknown)}. It knows {', '.join(sorted(known))}. "
            "Leave the callback out."
        )
    for model, type_ in zip(models, types, strict=True):
        with _own_classes(sys.modules[type(model).__module__]):
            known[type_](model=model, **choices)
    return types


@contextmanager
def _own_classes(module: ModuleType) -> Iterator[None]:
    """Give a module of transformers its classes back: models that are built later are not this callback's business."""
    before = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    try:
        yield
    finally:
        vars(module).update(before)


def _outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    from transformers import PreTrainedModel

    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for child in module.modules():
        if isinstance(child, PreTrainedModel) and id(child) not in inside:
            found.append(child)
            inside.update(map(id, child.modules()))
    return found
