"""The proof that a merged model is the adapted model: a stranger opens it and gives the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.errors import MergeError
from lightning_lora.sft.chat import END_OF_TURN

_SCRIPT = Path(__file__).with_name("plain_answers.py")


def find_model_folder(merged: Path) -> Path | None:
    """Return the first folder in a merged artifact that ``from_pretrained`` can open, or None."""
    return next((config.parent for config in sorted(merged.rglob("config.json"))), None)


def compare_answers(
    model_folder: Path, samples: Sequence[dict[str, str]], *, max_new_tokens: int, batch_size: int = 100
) -> dict[str, Any]:
    """Let a new process without lightning_lora answer the samples' prompts, and compare.

    Args:
        model_folder: A folder that ``AutoModelForCausalLM.from_pretrained`` opens.
        samples: ``{"prompt", "answer"}`` of the adapted model.
        max_new_tokens: The limit that the samples were made with.
        batch_size: Prompts answered together.

    Returns:
        ``same_answers`` of ``compared_answers``, and ``different_answers``: the pairs that differ.

    Raises:
        MergeError: The process failed, or it did import lightning_lora; the message holds what it said.
    """
    request = {
        "prompts": [sample["prompt"] for sample in samples],
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "end_of_turn": END_OF_TURN,
    }
    response = _ask_stranger(model_folder, request)
    pairs = list(zip([sample["answer"] for sample in samples], response["answers"], strict=True))
    different = [{"adapted": ours, "merged": theirs} for ours, theirs in pairs if ours != theirs]
    return {
        "same_answers": len(pairs) - len(different),
        "compared_answers": len(pairs),
        "different_answers": different,
    }


def _ask_stranger(model_folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch) / "request.json", Path(scratch) / "response.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        # -I: neither this script's folder nor PYTHONPATH is on the path.
        command = [sys.executable, "-I", str(_SCRIPT), str(model_folder), str(question), str(answer)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MergeError(f"A new process could not answer with {model_folder}:\n{done.stderr[-2000:]}")
        response: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if response["imported_from_lightning_lora"]:
        raise MergeError(f"The proof is void, it imported {', '.join(response['imported_from_lightning_lora'])}.")
    return response
