"""Weight averaging callbacks: they copy the whole module and average all of it, where only the adapters move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.frozen import FrozenStatistics
from lightning_lora.lightning_names import is_a

AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")


def prepare_averaging(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let the averaging callbacks of ``trainer`` leave the base as it is. All callbacks are set up by now.

    Raises:
        UnsupportedSetupError: If one has a copy without adapters, or would reset the statistics of the base.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if is_a(callback, *AVERAGING):
            _require_same_parameters(callback, module)
            if is_a(callback, "StochasticWeightAveraging"):
                _keep_statistics(callback, module)
            keep_equal(callback)


def keep_equal(callback: Any) -> None:
    """Make the average of equal tensors that tensor: ``0.999 * x + 0.001 * x`` is not ``x``, so a base would drift."""
    own = is_a(callback, "StochasticWeightAveraging")  # it averages itself, the other through torch's AveragedModel
    average = callback if own else callback._average_model
    for name, function in (("_avg_fn" if own else "avg_fn", _average_one), ("multi_avg_fn", _average_many)):
        current = getattr(average, name, None)
        if current is not None and getattr(current, "func", None) is not function:
            setattr(average, name, functools.partial(function, current))


def _equal(mean: Tensor, current: Tensor) -> bool:
    # Codes that are stored as floating-point numbers may be NaNs, which differ from themselves.
    both = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (mean, current))
    return torch.equal(mean, current) or (mean.dtype == current.dtype and torch.equal(*both))


def _average_one(average: Callable[..., Tensor], mean: Tensor, current: Tensor, count: Any) -> Tensor:
    return current if _equal(mean, current) else average(mean, current, count)


def _average_many(average: Callable[..., None], means: list[Tensor], currents: list[Tensor], count: Any) -> None:
    moved = [(mean, current) for mean, current in zip(means, currents, strict=True) if not _equal(mean, current)]
    if moved:
        average([mean for mean, _ in moved], [current for _, current in moved], count)


def _require_same_parameters(callback: Any, module: pl.LightningModule) -> None:
    copied = callback._average_model
    copied = getattr(copied, "module", copied)
    if [p.shape for p in copied.parameters()] != [p.shape for p in module.parameters()]:
        raise UnsupportedSetupError(
            f"{type(callback).__name__} copied the module before all layers and adapters were there, so it would "
            "average the wrong tensors. Build the layers in __init__."
        )


def _keep_statistics(callback: Any, module: pl.LightningModule) -> None:
    """SWA resets the statistics of norm layers to compute them anew; frozen ones never would be."""
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    frozen = [child for child in norms if isinstance(child, FrozenStatistics)]
    if frozen and len(frozen) < len(norms):
        raise UnsupportedSetupError(
            "StochasticWeightAveraging resets the running statistics of all BatchNorm layers, and some belong to the "
            "frozen base. Use WeightAveraging, or train all of them or none (modules_to_save)."
        )
    if frozen:
        callback.__dict__["pl_module_contains_batch_norm"] = _has_none


def _has_none(module: pl.LightningModule) -> bool:
    return False
