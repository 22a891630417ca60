"""Give optimizers another class, in place: schedulers, Lightning's wrappers and the module keep their references."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lora.errors import MissingDependencyError, UnsupportedSetupError
from lightning_lora.optimizer_swap.config import OptimizerConfig

_CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "paged_adamw": "PagedAdamW"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOT_IN_BITSANDBYTES = ("amsgrad", "maximize", "differentiable", "capturable")


def swap_optimizers(trainer: pl.Trainer, config: OptimizerConfig) -> None:
    """Make the Adam and AdamW optimizers of a run those of ``config``, with everything that they are set to.

    For ``on_fit_start``, after frozen parameters were taken out and before states are restored. An optimizer that has
    the class already, as in the second fit of a module that keeps it, and one without parameters stay as they are.

    Raises:
        UnsupportedSetupError: If an optimizer is of another family, or is set to what ``config.kind`` can't do; then
            none is changed.
        MissingDependencyError: If bitsandbytes is not installed.
    """
    wanted = _class_of(config.kind)
    held = {index: _unwrapped(optimizer) for index, optimizer in enumerate(trainer.optimizers)}
    held = {index: optimizer for index, optimizer in held.items() if _parameters(optimizer)}
    others = {i: o for i, o in held.items() if not isinstance(o, wanted) and not _is_bitsandbytes_own(o, wanted)}
    for index, optimizer in others.items():
        why_not = _why_not(optimizer, wanted)
        if why_not is not None:
            raise UnsupportedSetupError(
                f'optimizer="{config.kind}" can\'t take the place of optimizer {index} ({type(optimizer).__name__}): '
                f"{why_not}, or leave optimizer= out."
            )
    for optimizer in others.values():
        _become(optimizer, wanted)
    for wrapper in trainer.strategy._lightning_optimizers:
        _follow(wrapper)
    if config.kind.startswith("paged_"):
        _warn_of_cpu(config, held.values())


def _class_of(kind: str) -> type[Optimizer]:
    if kind == "adamw":
        return AdamW
    try:
        from lightning_lora.optimizer_swap import classes
    except ImportError as error:
        raise MissingDependencyError(
            f"optimizer=\"{kind}\" needs bitsandbytes ({error}): pip install 'lightning-lora[qlora]'"
        ) from error
    found: type[Optimizer] = getattr(classes, _CLASSES[kind])
    return found


def _unwrapped(optimizer: Any) -> Optimizer:
    # configure_optimizers may return Lightning's wrappers, whose class imitates that of what they wrap.
    found: Optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return found


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_bitsandbytes_own(optimizer: Optimizer, wanted: type[Optimizer]) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.") and issubclass(wanted, type(optimizer))


def _why_not(optimizer: Optimizer, wanted: type[Optimizer]) -> str | None:
    """What speaks against the swap and what to do, or None."""
    if type(optimizer).__module__.startswith("bitsandbytes."):
        return "it is already bitsandbytes'. Return torch.optim.AdamW from configure_optimizers"
    if not isinstance(optimizer, (Adam, AdamW)):
        return "it is neither torch.optim.Adam nor AdamW. Return one of these from configure_optimizers"
    replaced = _replaced_methods(optimizer)
    if replaced:
        return f"it has its own {', '.join(replaced)}, which would be lost. Return torch's AdamW itself"
    for group in optimizer.param_groups:
        if group["weight_decay"] and not group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)):
            # bitsandbytes' Adam8bit decouples it as well: both names are for one kernel.
            return (
                f"its weight_decay={group['weight_decay']} is added to the gradient, and there only is AdamW, which "
                "takes it off the weights. Return torch.optim.AdamW or use weight_decay=0"
            )
    return None if wanted is AdamW else _why_not_bitsandbytes(optimizer)


def _why_not_bitsandbytes(optimizer: Optimizer) -> str | None:
    for name in _NOT_IN_BITSANDBYTES:
        if any(group.get(name) for group in optimizer.param_groups):
            return f"bitsandbytes has no {name}=True. Return an optimizer without it"
    if any(parameter.dtype not in _DTYPES for parameter in _parameters(optimizer)):
        return "bitsandbytes computes in fp32, and its parameters are wider. Use another precision than 64-true"
    if optimizer._optimizer_load_state_dict_pre_hooks or optimizer._optimizer_load_state_dict_post_hooks:
        return "bitsandbytes calls no hooks of load_state_dict, and it has some. Return an optimizer without them"
    if any(optimizer.state.values()):
        return (
            "it has taken steps already, and its state has another form. Return a new optimizer from "
            "configure_optimizers"
        )
    return None


def _replaced_methods(optimizer: Optimizer) -> list[str]:
    """Names of methods that are not torch's, of a subclass or of this one object."""
    torchs = AdamW if isinstance(optimizer, AdamW) else Adam
    replaced = {
        name
        for cls in type(optimizer).__mro__[: type(optimizer).__mro__.index(torchs)]
        for name, value in vars(cls).items()
        if (inspect.isroutine(value) or isinstance(value, property))
        and name != "__init__"
        # torch itself puts a wrapper for hooks around the step of the class that is used first
        and not _is_same_function(value, getattr(torchs, name, None))
    }
    step = vars(optimizer).get("step")
    if step is not None and not (_is_scheduler_wrapper(step) and _is_same_function(step, type(optimizer).step)):
        replaced.add("step")
    return sorted(replaced)


def _is_same_function(one: Any, other: Any) -> bool:
    return callable(one) and callable(other) and inspect.unwrap(one) is inspect.unwrap(other)


def _is_scheduler_wrapper(step: Any) -> bool:
    return hasattr(step, "_wrapped_by_lr_sched")


class _NoSchedule(LRScheduler):
    """Does to ``optimizer.step`` what every scheduler's constructor does, and schedules nothing."""

    def step(self, epoch: int | None = None) -> None:
        pass


def _become(optimizer: Optimizer, wanted: type[Optimizer]) -> None:
    optimizer.__class__ = wanted
    if wanted is AdamW:
        for values in (optimizer.defaults, *optimizer.param_groups):
            values["decoupled_weight_decay"] = True  # else a decay was refused
    else:
        from lightning_lora.optimizer_swap.classes import complete

        vars(optimizer).pop("_step_supports_amp_scaling", None)  # of torch's fused step
        complete(optimizer)
    # Schedulers count steps through a wrapper in the object, around the step of the class that it had.
    if vars(optimizer).pop("step", None) is not None:
        _NoSchedule(optimizer)


def _follow(wrapper: LightningOptimizer) -> None:
    """Let Lightning's wrapper imitate the class that what it wraps has now, as its constructor does."""
    kind = type(wrapper.optimizer)
    if not isinstance(wrapper, kind):
        wrapper.__class__ = type(f"Lightning{kind.__name__}", (LightningOptimizer, kind), {})


def _warn_of_cpu(config: OptimizerConfig, optimizers: Iterable[Optimizer]) -> None:
    if any(parameter.device.type == "cpu" for optimizer in optimizers for parameter in _parameters(optimizer)):
        rank_zero_warn(f'optimizer="{config.kind}": on a CPU there is no paged memory; the state is in ordinary one.')
