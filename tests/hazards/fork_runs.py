"""A fit in forked processes, from a script of its own: test_ddp.py reads what the main process has afterwards."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from tests.conftest import TinyModule, make_loader
from tests.hazards.runs import digest, is_adapter_only, lora
from tests.states import adapters_of


def run(folder: Path, *, merge: bool) -> dict[str, object]:
    module, saver = TinyModule(), ModelCheckpoint(dirpath=folder)
    start = digest(module.state_dict())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[lora(merge=merge), saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, make_loader(rows=32), make_loader(rows=32))
    return {
        "moved": digest(module.state_dict()) != start,
        "adapters": len(adapters_of(module)),
        "adapter only": is_adapter_only(saver.best_model_path),
        "merged": [str(path) for path in folder.rglob("merged.ckpt")],
    }


def main(folder: Path) -> None:
    warnings.simplefilter("always")
    results = {str(merge): run(folder / str(merge), merge=merge) for merge in (False, True)}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
