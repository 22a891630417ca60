"""How many bytes a run takes, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.adapter import Adapter
from lightning_lora.config import AdapterConfig
from lightning_lora.gradient_checkpointing import (
    GradientCheckpointingConfig,
    as_gradient_checkpointing_config,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    recomputed_blocks,
)
from lightning_lora.gradient_checkpointing.models import turn_off_own
from lightning_lora.gradient_checkpointing.repeated import repeated_blocks
from lightning_lora.injection import inject_adapters
from lightning_lora.planning.batches import as_batch, describe, lengthened, resized
from lightning_lora.planning.codes import CodedLinear, store_as_codes
from lightning_lora.planning.dry_run import StepMemory, dry_run
from lightning_lora.planning.memory_plan import BaseMemory, MemoryPlan
from lightning_lora.planning.optimizer_state import OptimizerKind, OptimizerMemory, as_optimizer
from lightning_lora.planning.precision import Precision, as_precision
from lightning_lora.planning.sources import as_module
from lightning_lora.planning.steps import Step, step_for
from lightning_lora.planning.twin import meta_twin
from lightning_lora.quantization.config import QuantizationConfig, as_quantization_config
from lightning_lora.quantized_base import layers_to_quantize
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import find_record

Checkpointing = bool | GradientCheckpointingConfig | None


def plan_memory(
    module: nn.Module | str | Path | Any,
    config: AdapterConfig | None,
    *,
    batch: Any,
    quantization: QuantizationConfig | None = None,
    gradient_checkpointing: Checkpointing = None,
    optimizer: str | OptimizerKind | OptimizerMemory | Optimizer = "adamw",
    precision: str = "32-true",
    accumulate_grad_batches: int = 1,
    step: Callable[[nn.Module, Any], Any] | None = None,
) -> MemoryPlan:
    """Plan the memory of a fine-tuning run on one device.

    The module's own forward and the backward pass of torch run once on tensors that have shapes but no memory, with the
    adapters in place, and every storage is counted from its creation to its end. So this is right for any module; no
    weight is read, downloaded or allocated, and the module that is passed stays as it is.

    Args:
        module: An ``nn.Module`` on any device (also meta), a transformers config, a folder with a ``config.json``, or a
            name on the Hugging Face hub, of which the config alone is fetched. Its parts run in the modes that they are
            in, as Lightning leaves them; a model of a config or a name is in eval mode, as ``from_pretrained`` does it.
        config: The adapters; None adds none: what requires gradients trains, in a fresh module everything, in one that
            is adapted (and quantized) already its adapters.
        batch: ``TokenBatch(size, length)`` or the pair ``(size, length)`` for language models; for any other module an
            example batch, whose floating-point values are never looked at (its tensors may be on the meta device).
        quantization: Format of the frozen linear layers.
        gradient_checkpointing: True or a config: on; False: off, the model's own switch, too; None: as the module is,
            whose own switch (transformers) does nothing in eval mode.
        optimizer: ``"adamw"`` (torch's, on a GPU), ``"adamw_fused"``, ``"adamw8bit"`` (bitsandbytes),
            ``"paged_adamw8bit"`` and ``"paged_adamw"`` (whose states count as in the classes without pages),
            ``"sgd"``, ``"sgd_momentum"``, an :class:`~lightning_lora.OptimizerConfig`, a real optimizer of one of
            these classes, or an :class:`~lightning_lora.planning.OptimizerMemory`.
        precision: Lightning's: ``"32-true"`` (which leaves the module's dtypes as they are), ``"bf16-true"``,
            ``"16-true"``, ``"64-true"``, ``"bf16-mixed"``, ``"16-mixed"``.
        accumulate_grad_batches: More than 1: gradients of earlier batches are there during the whole step.
        step: From module and batch (of a ``TokenBatch``: a dict with ``input_ids`` and ``labels``) to the loss. None:
            the module's ``training_step``, or the ``loss`` that it returns, or a loss that suits its outputs.

    Returns:
        Bytes by part; see :class:`~lightning_lora.planning.MemoryPlan`.

    Raises:
        ValueError: For settings without meaning.
        UnsupportedSetupError: If the step looks at values that only a real run has or fails otherwise, or the base is
            quantized already.
        TargetNotFoundError: If the config selects nothing, or there are no blocks to recompute.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
        >>> plan = plan_memory(net, LoRAConfig(rank=4), batch=torch.empty(32, 64))
        >>> plan.adapters == 4 * 4 * (64 + 256 + 256 + 8)
        True
        >>> plan.fits(gigabytes=1)
        True
    """
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches!r}.")
    batch = as_batch(batch)
    module = as_module(module)
    request = _Request(
        module=module,
        config=config,
        batch=batch,
        quantization=as_quantization_config(quantization),
        gradient_checkpointing=gradient_checkpointing,
        optimizer=as_optimizer(optimizer),
        precision_name=precision,
        precision=as_precision(precision),
        accumulate=accumulate_grad_batches > 1,
        step=step or step_for(module, batch),
    )
    if config is None and request.quantization is not None:
        raise ValueError("quantization stores frozen layers: with config=None all layers train. Pass a LoRAConfig.")
    return request.plan(compare=True)


@dataclass(frozen=True)
class _Request:
    """What to plan; each field is one thing that a search may change."""

    module: nn.Module
    config: AdapterConfig | None
    batch: Any
    quantization: QuantizationConfig | None
    gradient_checkpointing: Checkpointing
    optimizer: OptimizerMemory
    precision_name: str
    precision: Precision
    accumulate: bool
    step: Step

    def plan(self, *, compare: bool) -> MemoryPlan:
        """Make the plan; ``compare`` adds what is kept with and without recomputation."""
        twin, kept_dense = self._twin()
        base = _base_memory(twin, kept_dense)
        trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        recomputes = bool(recomputed_blocks(twin)) or _recomputes_itself(twin)
        has_blocks = bool(repeated_blocks(twin))
        step = self._dry_run(twin)
        kept = {recomputes: step.kept, not recomputes: None}
        if compare and has_blocks:
            kept[not recomputes] = self._kept_otherwise(recomputes)
        return MemoryPlan(
            base=base,
            trainable_parameters=sum(parameter.numel() for parameter in trained),
            adapters=sum(parameter.nbytes for parameter in _adapter_parameters(twin).values()),
            gradients=sum(parameter.nbytes for parameter in trained),
            optimizer_state=sum(self.optimizer.state(parameter) for parameter in trained),
            optimizer_workspace=self.optimizer.workspace(trained),
            step=step,
            kept_without_recomputation=kept[False],
            kept_with_recomputation=kept[True],
            settings=self._settings(recomputes),
            replan=self.changed,
        )

    def changed(self, what: str, value: int) -> MemoryPlan:
        """The plan with another batch size, rank or length."""
        if what == "batch":
            return replace(self, batch=resized(self.batch, value)).plan(compare=False)
        if what == "length":
            return replace(self, batch=lengthened(self.batch, value)).plan(compare=False)
        if what == "rank" and self.config is not None:
            return replace(self, config=dataclasses.replace(self.config, rank=value)).plan(compare=False)
        choices = '"batch", "length"' + (', "rank"' if self.config is not None else "")
        raise ValueError(f"largest: choose what to enlarge of {choices}; got {what!r}.")

    def _twin(self) -> tuple[nn.Module, dict[str, str]]:
        """The module as it trains, on the meta device, and why linear layers of a quantized base stay dense."""
        twin = meta_twin(self.module, self.precision.cast)
        kept_dense: dict[str, str] = {}
        if self.config is not None:
            # Chosen before the injection, as there; what that leaves trainable is known only after it.
            wanted = self.quantization and layers_to_quantize(twin, self.config, self.quantization, frozenset())
            inject_adapters(twin, self.config)
            kept_dense = store_as_codes(twin, wanted, self.quantization) if wanted and self.quantization else {}
        if self.gradient_checkpointing is not None:
            disable_gradient_checkpointing(twin)
            turn_off_own(twin)
            chosen = as_gradient_checkpointing_config(self.gradient_checkpointing)
            if chosen is not None:
                enable_gradient_checkpointing(twin, chosen)
        return twin, kept_dense

    def _dry_run(self, twin: nn.Module, *, backward: bool = True) -> StepMemory:
        return dry_run(
            twin,
            self.batch,
            step=self.step,
            precision=self.precision,
            accumulate=self.accumulate,
            backward=backward,
        )

    def _kept_otherwise(self, recomputes: bool) -> int:
        other = replace(self, gradient_checkpointing=not recomputes)
        twin, _ = other._twin()
        return other._dry_run(twin, backward=False).kept

    def _settings(self, recomputes: bool) -> dict[str, str]:
        return {
            "model": type(self.module).__name__,
            "batch": describe(self.batch),
            "adapters": _adapters_in_words(self.module, self.config),
            "quantization": _format_in_words(self.module, self.quantization),
            "precision": self.precision_name,
            "gradient checkpointing": "on" if recomputes else "off",
            "optimizer": self.optimizer.name,
        }


def _adapters_in_words(module: nn.Module, config: AdapterConfig | None) -> str:
    record = find_record(module)
    configs = [config] if config is not None else list(record.configs.values()) if record is not None else []
    return ", ".join(f"{chosen.kind} rank {chosen.rank}" for chosen in configs) or "none, all trains"


def _format_in_words(module: nn.Module, quantization: QuantizationConfig | None) -> str:
    if quantization is not None:
        return f"{quantization.quant_type}{' (double)' if quantization.double_quant else ''}"
    return ", ".join(sorted({child.describe() for child in module.modules() if isinstance(child, QuantizedLayer)}))


def _recomputes_itself(twin: nn.Module) -> bool:
    """Whether the own switch of a model acts: that of transformers does so in training mode only, timm's always."""
    return any(
        vars(child).get("grad_checkpointing") is True
        or (child.training and vars(child).get("gradient_checkpointing") is True)
        for child in twin.modules()
    )


def _adapter_parameters(twin: nn.Module) -> dict[int, nn.Parameter]:
    adapters = (child for child in twin.modules() if isinstance(child, Adapter))
    return {id(parameter): parameter for child in adapters for parameter in child.parameters()}


def _base_memory(twin: nn.Module, kept_dense: dict[str, str]) -> BaseMemory:
    codes = {id(child.weight): (name, child) for name, child in twin.named_modules() if isinstance(child, CodedLinear)}
    adapters = _adapter_parameters(twin)
    base = [parameter for parameter in twin.parameters() if id(parameter) not in adapters]
    stored = [codes[id(parameter)][1].stored_bytes for parameter in base if id(parameter) in codes]
    dense = sum(parameter.nbytes for parameter in base if id(parameter) not in codes)
    return BaseMemory(
        parameters=sum(parameter.numel() for parameter in base),
        dense=dense + sum(buffer.nbytes for buffer in twin.buffers()),
        codes=sum(first for first, _ in stored),
        constants=sum(second for _, second in stored),
        quantized=tuple(name for name, _ in codes.values()),
        kept_dense=kept_dense,
    )
