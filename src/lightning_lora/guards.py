"""Refuse, before a run starts, the arrangements of Trainer, callbacks and module that would go wrong without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.adapter import Adapter
from lightning_lora.averaging import AVERAGING
from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.fingerprint import base_fingerprint, describe_difference
from lightning_lora.fused import is_emulated
from lightning_lora.lightning_names import is_a
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import Record, find_record
from lightning_lora.targets.patterns import canonical


def check_trainer(trainer: pl.Trainer, callback: pl.Callback, *, kind: type[pl.Callback], merges: bool) -> None:
    """Refuse strategies, plugins and callbacks that LoRA does not go with.

    Args:
        trainer: The Trainer of the run.
        callback: The callback of this run.
        kind: The class of which there may be one.
        merges: Whether the adapters are merged at fit end.

    Raises:
        UnsupportedSetupError: With what to do instead.
    """
    _check_strategy(trainer, merges=merges)
    _check_callbacks(trainer, callback, kind)
    if is_a(trainer.precision_plugin, "BitsandbytesPrecision"):
        raise UnsupportedSetupError(
            "BitsandbytesPrecision quantizes every linear layer after the injection, adapters and heads included. "
            "Remove the plugin."
        )


def holds_whole_parameters(trainer: pl.Trainer) -> bool:
    """Whether the strategy is one device or DDP, so that every process has all parameters in its own tensors."""
    strategy = trainer.strategy
    # DeepSpeed's strategy is a DDPStrategy by inheritance only: it shards, and saves through an engine of its own.
    return is_a(strategy, "SingleDeviceStrategy", "DDPStrategy") and not is_a(strategy, "DeepSpeedStrategy")


def _check_strategy(trainer: pl.Trainer, *, merges: bool) -> None:
    strategy = trainer.strategy
    if not holds_whole_parameters(trainer):
        raise UnsupportedSetupError(
            f"LoRACallback supports one device and DDP; {type(strategy).__name__} is not supported. "
            'Use strategy="auto" or "ddp".'
        )
    if is_a(strategy.launcher, "_MultiProcessingLauncher") and not merges:
        rank_zero_warn(
            "This strategy trains in processes of its own, and Lightning gives the main process only weights that it "
            "knows: the module there stays without adapters. Use the checkpoint, or merge_on_fit_end=True."
        )


def _check_callbacks(trainer: pl.Trainer, callback: pl.Callback, kind: type[pl.Callback]) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks:
        if is_a(other, "BaseFinetuning"):
            raise UnsupportedSetupError(
                f"{type(other).__name__} freezes and unfreezes the base, which LoRA keeps frozen: the checkpoints "
                "would lack what it trains. Use one of the two; modules_to_save trains modules in full."
            )
        if is_a(other, "ModelPruning"):
            raise UnsupportedSetupError(
                "ModelPruning prunes the weights of the base, which LoRA keeps as they are: no checkpoint would hold "
                "the masks. Prune the model first, or merge and prune then."
            )
        if isinstance(other, kind) and other is not callback:
            raise UnsupportedSetupError(f"There is more than one {kind.__name__}: pass one.")
    before = callbacks[: callbacks.index(callback)]
    for other in before:
        if is_a(other, *AVERAGING):
            raise UnsupportedSetupError(
                f"{type(other).__name__} copies the module in its setup, before the adapters are in: "
                f"list {type(callback).__name__} before it."
            )


def check_still_frozen(module: nn.Module, record: Record) -> None:
    """Refuse a base that somebody unfroze after the injection: it would train, and no checkpoint would hold it.

    Raises:
        UnsupportedSetupError: With the names of the unfrozen parameters.
    """
    adapters = {id(p) for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()}
    saved = set(record.saved)
    thawed = [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and id(p) not in adapters and canonical(name) not in saved
    ]
    if thawed:
        raise UnsupportedSetupError(
            f"{len(thawed)} parameters of the frozen base were made trainable after the injection, such as "
            f"{thawed[0]!r}: they would train, and no checkpoint would hold them. Remove the unfreeze() call, or name "
            "the module in modules_to_save."
        )


def require_equal_bases(trainer: pl.Trainer, module: nn.Module) -> None:
    """Refuse a quantized base that differs between processes: DDP makes the codes equal, and leaves the scales.

    Raises:
        UnsupportedSetupError: On every rank, if the base of one differs from that of rank zero.
    """
    if trainer.world_size == 1 or not any(isinstance(child, QuantizedLayer) for child in module.modules()):
        return
    record = find_record(module)
    assert record is not None
    own = base_fingerprint(module, record)
    difference = describe_difference(trainer.strategy.broadcast(own), own)
    if not trainer.strategy.reduce_boolean_decision(difference is None):
        raise UnsupportedSetupError(
            "The processes have different quantized bases, and each would train adapters for another model"
            + ("" if difference is None else f": compared with rank 0, {difference}")
            + ". Load pretrained weights, or call seed_everything(...) before the module is built."
        )


def warn_of_eval_mode(module: nn.Module) -> None:
    """Warn of a base whose dropout is off in training, as transformers' ``from_pretrained`` leaves it."""
    silent = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 and not child.training
    ]
    if silent:
        rank_zero_warn(
            f"{len(silent)} dropout layers of the base are in eval mode and do nothing in training, such as "
            f"{silent[0]!r} (from_pretrained returns a model in eval mode, and Lightning keeps it). Call .train() on "
            "the model in your LightningModule's __init__ if you want its dropout; the adapters' own dropout acts."
        )


def warn_of_slow_precision(trainer: pl.Trainer, module: nn.Module) -> None:
    """Warn of 16 bits on a CPU that has no instructions for them: fp32 takes a part of the time."""
    if trainer.strategy.root_device.type != "cpu":
        return
    kinds = {"bf16": torch.bfloat16, "16": torch.float16}
    dtypes = {kinds.get(str(trainer.precision).split("-")[0]), *(p.dtype for p in module.parameters())}
    for dtype in dtypes & {kind for kind in kinds.values() if is_emulated(kind)}:
        name = str(dtype).removeprefix("torch.")
        rank_zero_warn(
            f"This CPU has no instructions for {name}, which torch computes value by value: a step takes several times "
            'as long as in float32. Where there is memory for it, use precision="32-true" and a module in float32.'
        )


def warn_of_idle(optimizers: Sequence[Optimizer]) -> None:
    """Warn of optimizers that hold nothing any more: what they are for stays as it is."""
    for index, optimizer in enumerate(optimizers):
        if not any(group["params"] for group in optimizer.param_groups):
            rank_zero_warn(
                f"optimizer {index} ({type(optimizer).__name__}) holds only frozen parameters and will do nothing: "
                "adapt a layer of that module (target_modules), or train it in full (modules_to_save)."
            )


def explain(exception: BaseException) -> None:
    """Add what LoRA has to do with it to an error that a frozen base or the adapters make other code raise."""
    text = str(exception)
    if isinstance(exception, (AssertionError, KeyError)) and ".lora_A" in text:
        exception.args = (
            f"{text}. These are adapter tensors of LoRACallback: configure_optimizers sorts parameters by their module "
            "or name and has no place for them. Let it put what it does not know into one of its groups.",
        )
    elif isinstance(exception, ValueError) and "empty parameter list" in text:
        exception.args = (
            f"{text}. LoRACallback froze the base, and this optimizer got only frozen parameters: adapt a layer of its "
            "module (target_modules), or train it in full (modules_to_save).",
        )
    elif isinstance(exception, RuntimeError) and "does not require grad" in text:
        exception.args = (
            f"{text}. LoRACallback froze the base, and this loss depends on no adapter: adapt a layer that it goes "
            "through (target_modules), or train one in full (modules_to_save). Where the module recomputes "
            "activations with torch.utils.checkpoint, use_reentrant=True also cuts a frozen input off: pass False.",
        )
