"""Optimizers that the user built over whatever parameters: keep what trains, refuse what can't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_lora.checkpoint_file import MANIFEST
from lightning_lora.errors import AdapterMismatchError, CheckpointError, UnsupportedSetupError


def prune_frozen(optimizers: Sequence[Optimizer]) -> int:
    """Take frozen parameters out of the groups of ``optimizers``, in place.

    A checkpoint then holds the state of the adapters only, and LBFGS works on vectors of their size. Groups stay, also
    when they end up empty, so that schedulers with a value per group fit.

    Returns:
        The number of parameters taken out.
    """
    pruned = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            keep = [parameter.requires_grad for parameter in group["params"]]
            pruned += len(keep) - sum(keep)
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)  # Adagrad has allocated some already
            for key in ("params", "param_names"):
                if key in group:
                    # In place: LBFGS and some schedulers hold on to the list itself.
                    group[key][:] = [item for item, kept in zip(group[key], keep, strict=True) if kept]
    return pruned


def fuse_adamw(optimizers: Sequence[Optimizer]) -> None:
    """Let torch's Adam and AdamW update all tensors in one kernel, unless the user chose how.

    Adapters are hundreds of small tensors, and the default loop over them takes three times as long. It is the same
    algorithm, and takes no copy of the parameters, as the multi-tensor form does.
    """
    for optimizer in optimizers:
        if type(optimizer) not in (Adam, AdamW):
            continue
        for group in optimizer.param_groups:
            chosen = group.get("fused") is not None or group.get("foreach") is not None
            special = group.get("capturable") or group.get("differentiable") or isinstance(group["lr"], Tensor)
            if not chosen and not special and all(map(_has_fused_kernel, group["params"])):
                group["fused"] = True
                for parameter in group["params"]:
                    _keep_step_beside(parameter, optimizer.state.get(parameter, {}))


def _has_fused_kernel(parameter: Tensor) -> bool:
    return (
        type(parameter) is nn.Parameter and parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
    )


def _keep_step_beside(parameter: Tensor, state: dict[str, Any]) -> None:
    if isinstance(state.get("step"), Tensor):  # of a resume; the fused kernel reads it where the parameter is
        state["step"] = state["step"].to(device=parameter.device, dtype=torch.float32)


def require_trainable(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse a run in which a trainable parameter is in no optimizer.

    Raises:
        UnsupportedSetupError: With the names of the parameters that would never move.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if outside:
        raise UnsupportedSetupError(
            f"{len(outside)} trainable parameters are in no optimizer and would never move, such as {outside[0]!r}. "
            "The parameter list was made before the adapters existed (in __init__?), or the optimizer gets only some "
            "modules: call self.parameters() inside configure_optimizers()."
        )


def require_matching_state(optimizers: Sequence[Optimizer], checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose optimizer states belong to other optimizers or parameters than the live ones.

    Raises:
        CheckpointError: If it has none.
        AdapterMismatchError: With both sides.
    """
    states: Sequence[Mapping[str, Any]] | None = checkpoint.get("optimizer_states")
    if states is None:
        raise CheckpointError(
            "This checkpoint holds only weights (save_weights_only=True), and a fit can't be resumed from it. Load "
            "them with load_from_checkpoint and fit without ckpt_path, or resume from a full checkpoint."
        )
    if len(optimizers) != len(states):
        raise AdapterMismatchError(
            f"The checkpoint has the state of {len(states)} optimizers, the module configures {len(optimizers)}. "
            "Resume with the same configure_optimizers, or load only the weights."
        )
    kinds = checkpoint.get(MANIFEST, {}).get("optimizers", [])
    for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        kind = type(optimizer).__name__
        if index < len(kinds) and kinds[index] != kind:
            raise AdapterMismatchError(
                f"The optimizer state in the checkpoint is of {kinds[index]}, the optimizer here is {kind}. Resume "
                "with the same configure_optimizers and the same optimizer= of LoRACallback, or load only the weights "
                "(load_from_checkpoint)."
            )
        live = [len(group["params"]) for group in optimizer.param_groups]
        found = [len(group["params"]) for group in state["param_groups"]]
        if live != found:
            raise AdapterMismatchError(
                f"The optimizer state in the checkpoint belongs to {found} parameters by group, the optimizer here "
                f"holds {live}. Resume with the same configure_optimizers and adapter configuration."
            )
