"""What the hazard tests ask of a run: which tensors it has, what moved, and what a file holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig
from tests.conftest import make_loader
from tests.states import adapters_of, read


def lora(rank: int = 2, alpha: float = 4.0, *, merge: Any = False, **options: Any) -> LoRACallback:
    """A silent callback."""
    return LoRACallback(LoRAConfig(rank=rank, alpha=alpha, **options), merge_on_fit_end=merge, print_report=False)


def digest(state: dict[str, Tensor]) -> str:
    """The same for bitwise equal states, in any process."""
    parts = [f"{key}:".encode() + value.cpu().numpy().tobytes() for key, value in sorted(state.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def trained(module: nn.Module) -> bool:
    """Whether every adapter has left its zero start."""
    found = {key: value for key, value in adapters_of(module).items() if key.endswith("lora_B")}
    return bool(found) and all(bool(value.abs().max() > 0) for value in found.values())


def is_adapter_only(path: Any) -> bool:
    """Whether no state in the file holds anything but adapters."""
    found = read(path)
    states = [found[key] for key in ("state_dict", "current_model_state") if key in found]
    return all(state and all(".lora_" in key for key in state) for state in states)


def metric(results: list[Any]) -> float:
    """The one number that a validate or test run gave."""
    (values,) = results
    (value,) = values.values()
    return float(value)


def checkpointing(folder: Path, **options: Any) -> dict[str, Any]:
    """Trainer options to save into a folder."""
    callback = pl.callbacks.ModelCheckpoint(dirpath=folder, **{"save_last": True, **options})
    return {"enable_checkpointing": True, "callbacks": [callback]}


def fit(trainer: pl.Trainer, module: pl.LightningModule, *, ckpt_path: Any = None) -> None:
    """Fit and validate on the fixed data."""
    trainer.fit(module, make_loader(), make_loader(), ckpt_path=ckpt_path)
