"""Fit, resume, test and merge a LightningModule that nobody here wrote, as its users would.

A case is a Python file with

* ``LORA``: the ``LoRAConfig``,
* ``build()``: the module, with the same weights on every call,
* ``loaders()``: data loaders ``train``, ``val`` and ``test``, with the same batches on every call,
* ``outputs(module)``: a deterministic output,
* ``reopen(path)``: how the package's users open a Lightning checkpoint,

and, where they differ from the usual, ``LIGHTNING`` (``pytorch_lightning``), ``EVALUATE`` (``"validate"``) and
``PICKLED`` (the package's checkpoints open with ``weights_only=False`` only).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import lightning.pytorch
import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback, MergeConfig

EPOCHS = 2


def load_case(path: Path) -> ModuleType:
    """Import a case; skips, with its reason, where its package is not installed."""
    name = f"wild_case_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        case = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(case)
        sys.modules[name] = case
    return sys.modules[name]


@dataclass
class Run:
    """One finished fit, with what was to be seen of it before the end of fit."""

    module: Any
    trainer: Any
    lora: LoRACallback
    checkpoints: Path
    adapters: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    losses: list[float] = field(default_factory=list)

    @property
    def first_epoch(self) -> Path:
        return next(self.checkpoints.glob("epoch=0*"))

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"


class Life:
    """The runs of one case. Each is made when first asked for."""

    def __init__(self, case: ModuleType, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.lightning = getattr(case, "LIGHTNING", lightning.pytorch)
        self.weights_only = not getattr(case, "PICKLED", False)
        # What the package's users pass to the Trainer anyway.
        self.loading: dict[str, Any] = {} if self.weights_only else {"weights_only": False}

    @cached_property
    def whole(self) -> Run:
        """Trained in one go; adapters stay live."""
        return self._fit("whole")

    @cached_property
    def resumed(self) -> Run:
        """Continued, in a new module, from the first epoch's checkpoint of ``whole``; merged at the end."""
        merge = MergeConfig(output_dir=str(self.folder / "merged"))
        return self._fit("resumed", merge=merge, ckpt_path=str(self.whole.first_epoch))

    @property
    def merged_file(self) -> Path:
        assert self.resumed.lora.merge_report is not None
        assert self.resumed.lora.merge_report.folder is not None
        return Path(self.resumed.lora.merge_report.folder) / "merged.ckpt"

    def evaluate(self, run: Run, ckpt_path: str | None = None) -> dict[str, float]:
        """Metrics on the test data, of the module as it is or of a checkpoint."""
        method = getattr(self.case, "EVALUATE", "test")
        trainer = run.trainer
        L.seed_everything(99, verbose=False)
        (metrics,) = getattr(trainer, method)(
            run.module,
            dataloaders=self.case.loaders().get("test"),
            ckpt_path=ckpt_path,
            verbose=False,
            **(self.loading if ckpt_path else {}),
        )
        assert metrics, "the package logs no metric, so this would compare nothing"
        return dict(metrics)

    def new_run(self, name: str) -> Run:
        """A new module and Trainer that have not fitted anything."""
        lora = LoRACallback(self.case.LORA, print_report=False)
        checkpoints = self.folder / name
        trainer = self._trainer(checkpoints, [lora])
        return Run(self.case.build(), trainer, lora, checkpoints)

    def _fit(self, name: str, *, merge: bool | MergeConfig = False, ckpt_path: str | None = None) -> Run:
        lora = LoRACallback(self.case.LORA, merge_on_fit_end=merge, print_report=False)
        checkpoints = self.folder / name
        run = Run(self.case.build(), None, lora, checkpoints)
        run.trainer = self._trainer(checkpoints, [lora, self._observer(run)])
        loaders = self.case.loaders()
        L.seed_everything(1, verbose=False)
        run.trainer.fit(
            run.module,
            train_dataloaders=loaders.get("train"),
            val_dataloaders=loaders.get("val"),
            ckpt_path=ckpt_path,
            **(self.loading if ckpt_path else {}),
        )
        return run

    def _trainer(self, checkpoints: Path, callbacks: list[Any]) -> Any:
        keep = self.lightning.callbacks.ModelCheckpoint(dirpath=checkpoints, save_top_k=-1, save_last=True)
        return self.lightning.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, default_root_dir=self.folder,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, keep],
        )  # fmt: skip

    def _observer(self, run: Run) -> Any:
        case = self.case

        class Observer(self.lightning.Callback):  # type: ignore[misc, name-defined]
            """Notes the losses and the end of training."""

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
                run.losses.append(float(loss))

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                run.adapters = {key: value.clone() for key, value in adapter_tensors(pl_module).items()}
                run.outputs = in_eval(pl_module, case.outputs)

        return Observer()


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors by key."""
    return {key: value for key, value in module.state_dict().items() if ".adapters." in key}


def in_eval(module: Any, outputs: Any) -> Tensor:
    """``outputs(module)`` in eval mode, leaving the mode of each child and the random stream as they were."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    with torch.no_grad(), torch.random.fork_rng():
        result = outputs(module).clone()
    for child, mode in modes.items():
        child.training = mode
    return result
