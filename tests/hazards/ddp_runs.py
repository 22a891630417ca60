"""What each of two processes does: started by test_ddp.py with a rank in the environment, it notes what it saw."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_lora import FlatOptimizer, MergeConfig, QuantizationConfig, UnsupportedSetupError
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import digest, lora, metric, trained
from tests.states import adapters_of, base_of

RANK = int(os.environ.get("LOCAL_RANK", "0"))
Result = dict[str, Any]


class Unused(TinyModule):
    """Its loss does not go through one of its layers."""

    def build(self) -> None:
        super().build()
        self.idle = nn.Linear(WIDTH, WIDTH)


class Lazy(TinyModule):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            super().build()


def trainer_for(folder: Path, *callbacks: Any, epochs: int = 1, unused: bool = False, **options: Any) -> pl.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused, timeout=timedelta(seconds=40))
    settings: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**settings, **options},
    )


def fit(trainer: pl.Trainer, module: TinyModule, resume: Any = None) -> None:
    # Without a seed, as users forget it: the streams of the two processes differ.
    torch.manual_seed(100 + RANK)
    trainer.fit(module, make_loader(rows=32), make_loader(rows=32), ckpt_path=resume)


def seen(module: nn.Module) -> Result:
    return {"adapters": digest(adapters_of(module)), "base": digest(base_of(module)), "trained": trained(module)}


def start(folder: Path) -> Result:
    module = TinyModule()
    fit(trainer_for(folder, lora(init="gaussian"), epochs=0), module)
    return seen(module)


def whole(folder: Path) -> Result:
    module = TinyModule()
    fit(trainer_for(folder, lora(dropout=0.0), epochs=2), module)
    return seen(module)


def parts(folder: Path) -> Result:
    saver = ModelCheckpoint(dirpath=folder)
    fit(trainer_for(folder, lora(), saver), TinyModule())
    module = TinyModule()
    trainer = trainer_for(folder, lora(), ModelCheckpoint(dirpath=folder), epochs=2)
    fit(trainer, module, saver.best_model_path)
    return {**seen(module), "path": saver.best_model_path, "step": trainer.global_step}


def flat(folder: Path) -> Result:
    module = TinyModule()
    fit(trainer_for(folder, lora(dropout=0.0), FlatOptimizer(), epochs=2, gradient_clip_val=0.5), module)
    plain = TinyModule()
    fit(trainer_for(folder, lora(dropout=0.0), epochs=2, gradient_clip_val=0.5), plain)
    expected = adapters_of(plain)
    close = all(torch.allclose(value, expected[key], atol=1e-5) for key, value in adapters_of(module).items())
    return {**seen(module), "close": close}


def other_base(folder: Path) -> Result:
    module = TinyModule(seed=RANK)
    fit(trainer_for(folder, lora()), module)
    return seen(module)


def lazy(folder: Path) -> Result:
    module = Lazy()
    fit(trainer_for(folder, lora()), module)
    return seen(module)


def wrong_base(folder: Path) -> Result:
    path = folder.parent / "parts" / "epoch=0-step=2.ckpt"
    try:
        fit(trainer_for(folder, lora(), epochs=2), TinyModule(seed=5), path)
    except Exception as error:
        return {"error": type(error).__name__}
    return {"error": None}


def unused(folder: Path) -> Result:
    module = Unused()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(trainer_for(folder, lora(), unused=True), module)
    messages = [str(w.message) for w in caught]
    own = [key for key in adapters_of(module) if key.startswith("idle.")]
    moved = all(
        bool((module.state_dict()[key] != 0).any())
        for key in adapters_of(module)
        if key.endswith("B") and key not in own
    )
    return {**seen(module), "warned": any("'idle.adapters" in text for text in messages), "others trained": moved}


def unused_without_search(folder: Path) -> Result:
    try:
        fit(trainer_for(folder, lora()), Unused())
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def merge(folder: Path, **options: Any) -> Result:
    module = TinyModule()
    saver = ModelCheckpoint(dirpath=folder / "saved", monitor="val_loss")
    callback = lora(merge=MergeConfig(source="best"))
    trainer = trainer_for(folder, callback, saver, epochs=2, **options)
    fit(trainer, module)
    state, plain = digest(module.state_dict()), type(module.backbone[0]) is nn.Linear
    first = metric(trainer.test(module, make_loader(rows=32), verbose=False))
    best = metric(trainer.test(module, make_loader(rows=32), ckpt_path="best", verbose=False))
    report = callback.merge_report
    return {
        "plain": plain,
        "merged": state,
        "folder": report.folder if report is not None else None,
        "error": report.max_relative_error if report is not None else None,
        "scores": [first, best],
    }


def merge_with_logger(folder: Path) -> Result:
    return merge(folder, logger=CSVLogger(folder))


def failing_merge(folder: Path) -> Result:
    module = TinyModule()
    callback = lora(merge=MergeConfig(tolerance=1e-12))
    try:
        fit(trainer_for(folder, callback), module)
    except Exception as error:
        return {"error": type(error).__name__, "trained": trained(module)}
    return {"error": None}


class Blocking(TinyModule):
    """Puts a file where the folder of the merge should be, too late for any check."""

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            (Path(self.trainer.default_root_dir) / "blocked").touch()


def unwritable_merge(folder: Path) -> Result:
    callback = lora(merge=MergeConfig(output_dir=str(folder / "blocked" / "merged")))
    try:
        fit(trainer_for(folder, callback), Blocking())
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


def quantized(folder: Path, seed: int = 0) -> Result:
    module, callback = TinyModule(seed=seed), lora()
    callback.quantization = QuantizationConfig(double_quant=True)
    try:
        fit(trainer_for(folder, callback), module)
    except UnsupportedSetupError as error:
        return {"error": str(error)}
    return {**seen(module), "error": None}


def other_quantized_base(folder: Path) -> Result:
    return quantized(folder, seed=RANK)


RUNS: list[Callable[[Path], Result]] = [
    start,
    whole,
    flat,
    parts,
    other_base,
    lazy,
    wrong_base,
    unused,
    merge,
    merge_with_logger,
    failing_merge,
    unwritable_merge,
    quantized,
    other_quantized_base,
    unused_without_search,
]


def main(folder: Path) -> None:
    results = {}
    for run in RUNS:
        place = folder / run.__name__
        place.mkdir(exist_ok=True)
        print("run", run.__name__, flush=True)
        results[run.__name__] = run(place)
        (folder / f"rank{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
