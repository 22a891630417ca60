"""What each of two processes does over a quantized base: started by test_ddp.py with a rank in the environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import MergeConfig
from lightning_lora.quantized_layer import QuantizedLayer
from tests.conftest import TinyModule
from tests.hazards.ddp_runs import RANK, fit, trainer_for
from tests.hazards.runs import digest, trained
from tests.quantization.lives import qlora
from tests.quantization.quantized import codes_of
from tests.states import adapters_of

FORMS = ("nf4-double", "int8")


def run(folder: Path, form: str, *, epochs: int, resume: Any = None, merge: bool = False) -> dict[str, Any]:
    module, saver = TinyModule(), ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    before = TinyModule()
    callback = qlora(form, merge=MergeConfig(output_dir=str(folder / "merged")) if merge else False)
    fit(trainer_for(folder, callback, saver, epochs=epochs), module, resume)
    if merge:
        dense = not any(isinstance(child, QuantizedLayer) for child in module.modules())
        return {"dense": dense, "state": digest(module.state_dict())}
    fit(trainer_for(folder / "start", qlora(form), epochs=0), before)
    return {
        "adapters": digest(adapters_of(module)),
        "codes": digest(codes_of(module)),
        "codes before": digest(codes_of(before)),
        "trained": trained(module),
    }


def main(folder: Path) -> None:
    results = {}
    for form in FORMS:
        place = folder / form
        place.mkdir(exist_ok=True)
        results[form] = {
            "whole": run(place / "whole", form, epochs=2),
            "resumed": run(place / "resumed", form, epochs=2, resume=place / "whole" / "epoch=0.ckpt"),
            "merged": run(place / "merge", form, epochs=2, merge=True),
        }
        (folder / f"rank{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
