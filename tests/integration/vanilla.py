"""What a user without lightning_lora does with a merged artifact. This file must not import lightning_lora."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tests.integration.language import Language, token_loader, tokens
from tests.integration.networks import ROWS, Eager, loader, rows


def inputs() -> Tensor:
    return torch.stack([rows()[index][0] for index in range(ROWS)])


def outputs(module: nn.Module) -> Tensor:
    """Of either kind of module, for its whole data."""
    with torch.no_grad():
        result: Tensor = module.eval()(tokens() if isinstance(module, Language) else inputs())
        return result


def open_artifacts(folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Open each artifact with its original class, and with transformers' own where it holds such a model."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return {kind: open_artifact(kind, Path(folder)) for kind, folder in folders.items()}


def open_artifact(kind: str, folder: Path) -> dict[str, Any]:
    cls, data = (Eager, loader()) if kind == "regression" else (Language, token_loader())
    module = cls.load_from_checkpoint(folder / "merged.ckpt")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    found = {
        "state": module.state_dict(),
        "hparams": dict(module.hparams),
        "loss": trainer.test(module, data, verbose=False)[0]["test_loss"],
        "outputs": outputs(module),
    }
    return found if kind == "regression" else {**found, **open_pretrained(kind, folder / "model")}


def open_pretrained(kind: str, folder: Path) -> dict[str, Any]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    head = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = head.from_pretrained(folder).eval()
    body = AutoModel.from_pretrained(folder).eval()
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        return {
            "pretrained outputs": model(input_ids=tokens()).logits,
            "body outputs": body(input_ids=tokens()).last_hidden_state,
            "tied": embedding is output,
            "dtype": str(model.dtype),
        }
