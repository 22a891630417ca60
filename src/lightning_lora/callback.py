"""The callback: Trainer hooks, in the order in which the Trainer calls them, onto the functions of this package."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.averaging import prepare_averaging
from lightning_lora.checkpoint_file import MANIFEST
from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.fit_end import check_merge, merge_at_fit_end
from lightning_lora.frozen import keep_base_as_is
from lightning_lora.frozen_layer import drop_cast_copies
from lightning_lora.fused import siblings
from lightning_lora.gradient_checkpointing import (
    GradientCheckpointingConfig,
    as_gradient_checkpointing_config,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    never_called,
    recomputed_blocks,
)
from lightning_lora.guards import (
    check_still_frozen,
    check_trainer,
    explain,
    warn_of_eval_mode,
    warn_of_idle,
    warn_of_slow_precision,
)
from lightning_lora.hooks import patch_checkpoints, patch_run, unpatch_run
from lightning_lora.injection import extend_adapters
from lightning_lora.layers import adapted_layers
from lightning_lora.lightning_names import is_a
from lightning_lora.lora import LoRAConfig
from lightning_lora.memory_log import MemoryLog
from lightning_lora.merging import MergeConfig, MergeReport, is_merged, original_weights, unmerge_adapters
from lightning_lora.optimizer_swap import OptimizerConfig, as_optimizer_config, swap_optimizers
from lightning_lora.optimizers import fuse_adamw, prune_frozen, require_matching_state, require_trainable
from lightning_lora.planning import MemoryPlan
from lightning_lora.quantization.config import QuantizationConfig, as_quantization_config
from lightning_lora.random_state import forget_random_state, reach_epoch_start, resume_random_state
from lightning_lora.record import find_record
from lightning_lora.report import InjectionReport
from lightning_lora.sample import SampleCall
from lightning_lora.tracking import log_checkpoint_bytes, log_merge, log_run

log = logging.getLogger(__name__)


class LoRACallback(pl.Callback):
    """Fine-tune any LightningModule with LoRA: the module and its optimizer code stay as they are.

    The base is frozen, the layers that ``config`` means get adapters, every checkpoint holds only what was trained,
    ``trainer.fit(ckpt_path=...)`` continues bitwise (within an epoch: if the data loader can, too), ``validate``,
    ``test`` and ``predict`` work with and without ``ckpt_path``, and at fit end the adapters are merged if asked.

    Args:
        config: What to adapt; default: every linear layer, rank 8.
        quantization: Store the frozen linear layers of the base in 4, 8 or 16 bits; None: leave them as they are.
        gradient_checkpointing: Let blocks keep only their inputs for the backward pass of a fit, which computes the
            rest again; a :class:`~lightning_lora.GradientCheckpointingConfig` says which. In train and in eval mode.
        optimizer: Train with bitsandbytes' 8-bit or paged AdamW in the place of the module's own Adam or AdamW:
            ``"adamw8bit"``, ``"paged_adamw8bit"``, ``"paged_adamw"``; see :class:`~lightning_lora.OptimizerConfig`.
        base_weights: Where a module that was built without values gets its weights from, see
            :func:`~lightning_lora.inject_adapters`.
        log_memory: Log the planned and the measured peak of one early batch, as ``lora/planned_peak_bytes`` and
            ``lora/measured_peak_bytes``. For the plan the module's ``training_step`` runs once more, on a copy without
            values.
        merge_on_fit_end: Write merged weights after the training and make the module plain with them; a
            :class:`~lightning_lora.MergeConfig` says how.
        print_report: Print what was adapted when a fit begins.

    Attributes:
        report: What was adapted; set when a run has begun.
        merge_report: Proof of the merge; set when a fit has ended.

    Raises:
        TargetNotFoundError: From a run, if nothing can be adapted as ``config`` says.
        UnsupportedSetupError: From a run, if the Trainer, its callbacks or the module would make it silently wrong.
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        quantization: QuantizationConfig | None = None,
        gradient_checkpointing: bool | GradientCheckpointingConfig = False,
        optimizer: str | OptimizerConfig | None = None,
        base_weights: str | Path | None = None,
        log_memory: bool = False,
        merge_on_fit_end: bool | MergeConfig = False,
        print_report: bool = True,
    ) -> None:
        super().__init__()
        self.config = _as_config(config)
        self.quantization = as_quantization_config(quantization)
        self.gradient_checkpointing = as_gradient_checkpointing_config(gradient_checkpointing)
        self.optimizer = as_optimizer_config(optimizer)
        self.base_weights = base_weights
        self.log_memory = log_memory
        self.merge_config = _as_merge_config(merge_on_fit_end, base_weights)
        self.print_report = print_report
        self.report: InjectionReport | None = None
        self.merge_report: MergeReport | None = None
        self._sample = SampleCall()
        self._memory: MemoryLog | None = None
        self._waiting: dict[int, str] | None = None

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What a batch should take, with ``log_memory``; None where that can't be planned (the log says why)."""
        return None if self._memory is None else self._memory.plan

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt what exists already, and arrange for the rest to be adapted when it has been built."""
        check_trainer(trainer, self, kind=LoRACallback, merges=self.merge_config is not None)
        if stage == "fit":
            if self.merge_config is not None:
                check_merge(trainer, self.merge_config)
            if is_merged(pl_module):
                unmerge_adapters(pl_module)
        checkpointing = self.gradient_checkpointing if stage == "fit" else None
        prepare = functools.partial(
            _prepare,
            checkpointing=checkpointing,
            config=self.config,
            quantization=self.quantization,
            base_weights=self.base_weights,
            device=_quantizing_device(trainer),
        )
        patch_run(trainer, pl_module, prepare)
        if not is_merged(pl_module) and prepare(pl_module, strict=False):
            patch_checkpoints(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave only trained parameters in the optimizers, and refuse a run that would train nothing."""
        self._remember_report(trainer, pl_module)
        if self.merge_config is not None and self.merge_config.base == "original":
            original_weights(pl_module, self.merge_config.original)  # what is not there is found now
        prepare_averaging(trainer, pl_module)
        optimizers = [o for o in trainer.optimizers if o.param_groups]
        if optimizers:
            prune_frozen(optimizers)
            if self.optimizer is not None:
                swap_optimizers(trainer, self.optimizer)
            fuse_adamw(optimizers)
            require_trainable(pl_module, optimizers)
            warn_of_idle(optimizers)
            restored = getattr(trainer._checkpoint_connector, "_loaded_checkpoint", {})
            if restored:
                require_matching_state(optimizers, restored)
            if "random_state" in restored.get(MANIFEST, {}):
                resume_random_state(trainer, restored[MANIFEST]["random_state"])
        if self.print_report and trainer.is_global_zero and not trainer.barebones:
            _print(self.report)
            recomputed = recomputed_blocks(pl_module)
            if recomputed:
                log.info("%d blocks are recomputed in backward, such as %s", len(recomputed), recomputed[0])
        if self.report is not None:
            log_run(trainer, hyperparameters=self.config.to_dict(), report=self.report)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the adapters in train mode, whatever mode the base is in."""
        record = find_record(pl_module)
        if record is not None:  # sync_batchnorm=True has put other norm layers in the place of the frozen ones
            keep_base_as_is(pl_module, saved=record.saved)
        adapters = {name: child for name, child in pl_module.named_modules() if isinstance(child, Adapter)}
        for adapter in adapters.values():
            adapter.train()
        warn_of_eval_mode(pl_module)
        warn_of_slow_precision(trainer, pl_module)
        self._waiting = {
            id(parameter): f"{name}.{key}"
            for name, adapter in adapters.items()
            for key, parameter in adapter.named_parameters()
            if parameter.requires_grad
        }
        self._backwards = 0
        self._memory = MemoryLog() if self.log_memory else None
        if self.merge_config is not None:
            self._sample.watch(pl_module, next(name for name, _ in adapted_layers(pl_module)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where a resumed run goes on at the start of an epoch: continue its random streams."""
        reach_epoch_start(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a base that another callback or the module unfroze; plan and measure the memory of a batch."""
        if batch_idx == 0:
            self._check_still_frozen(pl_module)
            drop_cast_copies(pl_module)  # a hook at the epoch's start may have written through weight.data
        if self._memory is not None:
            self._memory.start(trainer, pl_module, batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what no layer took, and note which adapters got a gradient in the first batch."""
        siblings.forget_joint()
        if self._waiting is not None:
            self._backwards += 1
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    self._waiting.pop(id(parameter), None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first batch with a backward: report adapters that the loss does not reach."""
        if self._memory is not None:
            self._memory.finish(trainer, pl_module)
        if self._waiting is not None and self._backwards:
            _check_reached(pl_module, self._waiting)
            _check_recomputed(pl_module)
            self._waiting = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for what was unfrozen within the epoch, before anything of it is saved at its end."""
        self._check_still_frozen(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the report, and evaluate with the weights as they are."""
        self._remember_report(trainer, pl_module)
        drop_cast_copies(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the report."""
        self._remember_report(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the report."""
        self._remember_report(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge. All checkpoints are saved by now, and the module is back on the CPU (single device and DDP)."""
        drop_cast_copies(pl_module)
        self._sample.stop()
        size = _checkpoint_bytes(trainer)
        if size is not None:
            log_checkpoint_bytes(trainer, size)
        if self.merge_config is not None and not is_merged(pl_module):
            self.merge_report = merge_at_fit_end(trainer, pl_module, self.merge_config, self._sample)
            log_merge(trainer, self.merge_report)
            if self.print_report and trainer.is_global_zero and not trainer.barebones:
                _print(self.merge_report)
        self._sample.forget()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take away what was put in place for this run; adapters and adapter-only checkpoints stay."""
        self._clean(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same after an error or Ctrl-C, when Lightning calls neither ``on_fit_end`` nor ``teardown``."""
        self._clean(trainer, pl_module)
        explain(exception)

    def _check_still_frozen(self, module: pl.LightningModule) -> None:
        record = find_record(module)
        if record is not None:
            check_still_frozen(module, record)

    def _clean(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        drop_cast_copies(pl_module)
        self._sample.forget()
        self._waiting = None
        if self._memory is not None:
            self._memory.abandon()
        forget_random_state(trainer)
        if self.gradient_checkpointing is not None:
            disable_gradient_checkpointing(pl_module)
        unpatch_run(trainer, pl_module)

    def _remember_report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = find_record(pl_module)
        self.report = record.report if record is not None else None


def _prepare(
    module: pl.LightningModule, *, checkpointing: GradientCheckpointingConfig | None, strict: bool, **how: Any
) -> bool:
    """Let the blocks that are there be recomputed, and adapt their layers; returns whether anything is adapted."""
    if checkpointing is not None:
        enable_gradient_checkpointing(module, checkpointing, strict=strict)
    return extend_adapters(module, strict=strict, **how) is not None


def _quantizing_device(trainer: pl.Trainer) -> torch.device | None:
    """A GPU quantizes a hundred times faster than a CPU, and the module is moved there anyway."""
    device = trainer.strategy.root_device
    return device if device.type in ("cuda", "xpu") else None


def _as_config(config: Any) -> LoRAConfig:
    """Accept what Hydra makes of a nested node without ``_target_``, too."""
    if config is None:
        return LoRAConfig()
    if isinstance(config, Mapping):
        fields = {str(key): value for key, value in config.items() if key not in ("kind", "_target_")}
        return LoRAConfig(**fields)
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"config must be a LoRAConfig, got {config!r}.")
    return config


def _as_merge_config(merge: Any, base_weights: str | Path | None) -> MergeConfig | None:
    if isinstance(merge, bool):
        return MergeConfig() if merge else None
    if isinstance(merge, Mapping):
        merge = MergeConfig(**{str(key): value for key, value in merge.items() if key != "_target_"})
    if merge is not None and not isinstance(merge, MergeConfig):
        raise ValueError(f"merge_on_fit_end must be True, False or a MergeConfig, got {merge!r}.")
    if merge is not None and merge.base == "original" and merge.original is None and base_weights is not None:
        return dataclasses.replace(merge, original=str(base_weights))
    return merge


def _check_reached(module: nn.Module, missed: dict[int, str]) -> None:
    trainable = sum(
        p.requires_grad for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()
    )
    if not missed:
        return
    names = list(missed.values())
    if len(names) == trainable:
        raise UnsupportedSetupError(
            f"No adapter got a gradient from the first training step, such as {names[0]!r}: the loss does not go "
            "through the adapted layers' forward (F.linear(x, layer.weight) bypasses it). Adapt other layers."
        )
    rank_zero_warn(
        f"{len(names)} of {trainable} adapter tensors got no gradient from the first training step, such as "
        f"{names[0]!r}: either this batch did not use the layer, or its forward is bypassed and it will never train."
    )


def _check_recomputed(module: nn.Module) -> None:
    idle = never_called(module)
    if idle:
        rank_zero_warn(
            f"{len(idle)} blocks that gradient checkpointing should recompute were not called in the first training "
            f"step, such as {idle[0]!r}: their activations are kept if something else runs their layers. Name the "
            "blocks that are called (GradientCheckpointingConfig(blocks=...))."
        )


def _checkpoint_bytes(trainer: pl.Trainer) -> int | None:
    callbacks: list[Any] = list(trainer.checkpoint_callbacks)
    for callback in callbacks:
        if is_a(callback, "ModelCheckpoint"):
            path = Path(callback.best_model_path or callback.last_model_path or "")
            if path.is_file():
                return path.stat().st_size
    return None


def _print(report: InjectionReport | MergeReport | None) -> None:
    if report is not None:
        import rich

        rich.print(report)
