"""The pieces of a run over a quantized base; imported by tests and by the processes that they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lora import LoRACallback, LoRAConfig, QuantizationConfig, load_from_checkpoint
from tests.integration.lives import Recorder, best_and_last, quiet_trainer, silence
from tests.integration.networks import Eager, Regression, loader
from tests.quantization.quantized import FORMATS, codes_of
from tests.states import adapters_of


def qlora(form: str | None = "nf4", *, merge: Any = False, base: dict[str, Any] | None = None, **lora: Any) -> Any:
    """A silent callback; ``form`` is one of FORMATS, or None for a dense base; ``base`` are further options of it."""
    quantization = None if form is None else QuantizationConfig(**{**FORMATS[form], **(base or {})})
    config = LoRAConfig(**{"rank": 2, "alpha": 8.0, **lora})
    return LoRACallback(config, quantization=quantization, merge_on_fit_end=merge, print_report=False)


def fit(
    folder: Path,
    form: str | None = "nf4",
    *,
    module: Regression | None = None,
    epochs: int = 2,
    resume: Any = None,
    seed: int = 7,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> tuple[pl.Trainer, Regression, Recorder]:
    """Fit with dropout in base and adapters, a validation after every epoch, and all checkpoints in ``folder``."""
    with isolate_rng():
        pl.seed_everything(seed, verbose=False)
        module = Eager(dropout=0.3, ruin=1.0) if module is None else module
        recorder = Recorder()
        of_trainer = {key: options.pop(key) for key in ("precision", "max_steps") if key in options}
        saver = best_and_last(folder, filename="{step}")
        callback = qlora(form, **{"dropout": 0.3, **options})
        trainer = quiet_trainer(folder, callback, saver, *callbacks, epochs=epochs, logger=recorder, **of_trainer)
        trainer.fit(module, loader(shuffle=True), loader(), ckpt_path=resume)
    return trainer, module, recorder


def seen(trainer: pl.Trainer, module: Regression, recorder: Recorder) -> dict[str, Any]:
    """Everything that a resumed run has to have in common with one that never stopped."""
    return {
        "step": trainer.global_step,
        "adapters": adapters_of(module),
        "codes": codes_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "losses": recorder.of("train_loss"),
    }


def continue_all(halves: list[tuple[str, str]]) -> dict[str, Any]:
    """The second epochs, with other random streams at their start, and modules that are rebuilt from a file alone.

    Runs in a new process.
    """
    silence()
    found = {}
    for form, folder in halves:
        resumed = seen(*fit(Path(folder) / "2", form, seed=99, resume=Path(folder) / "step=4.ckpt"))
        found[form] = {**resumed, "rebuilt": outputs(load_from_checkpoint(Eager, Path(folder) / "last.ckpt"))}
    return found


def outputs(module: pl.LightningModule) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(torch.linspace(-1, 1, 48).view(6, 8))
