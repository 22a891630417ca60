"""Reading gzipped JSON lines, and what each data set's lines mean."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from lightning_lora.sft.chat import Example, answer_json


def read_records(data_dir: str, split: str) -> list[dict[str, Any]]:
    """Read ``<data_dir>/<split>.jsonl.gz``.

    Raises:
        FileNotFoundError: The folder or the file isn't there; the message says which setting to change.
    """
    path = Path(data_dir) / f"{split}.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"No data at {path.absolute()}. Point data_dir (command line: data.data_dir=FOLDER) at the "
            f"folder that holds train.jsonl.gz, validation.jsonl.gz and test.jsonl.gz."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def snips_example(record: dict[str, Any]) -> Example:
    """Intent and slots of a voice-assistant request."""
    answer = {"intent": record["intent"], "slots": record["slots"]}
    return Example(text=record["text"], answer=answer_json(answer))


def e2e_example(record: dict[str, Any]) -> Example:
    """The facts of a restaurant description."""
    return Example(text=record["text"], answer=answer_json(record["fields"]))
