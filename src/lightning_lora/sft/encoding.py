"""From examples to padded batches: labels on the answer only, batches of like length.

Everything is padded on the left, for training as for generation: answers end together, so that logits are
needed for the last columns only, and the model sees prompts in the same form when it learns and when it
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from lightning_lora.sft.chat import END_OF_TURN

IGNORED = -100  # the label that cross_entropy leaves out


class Batch(TypedDict):
    """One batch; B rows, T tokens of prompt and answer, P tokens of prompt alone, all int64."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), IGNORED outside the answer
    prompt_ids: torch.Tensor  # (B, P)
    prompt_mask: torch.Tensor  # (B, P)
    prompts: list[str]
    expected: list[str]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An example as token ids; ``answer_ids`` ends with the end-of-turn token."""

    prompt: str
    expected: str
    prompt_ids: list[int]
    answer_ids: list[int]

    def __len__(self) -> int:
        """Return the number of tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def encode(prompt: str, answer: str, tokenizer: Any) -> Encoded:
    """Turn a prompt and its answer into token ids, separately, so that the border between them is exact."""
    return Encoded(
        prompt=prompt,
        expected=answer,
        prompt_ids=tokenizer(prompt, add_special_tokens=False)["input_ids"],
        answer_ids=tokenizer(answer + END_OF_TURN, add_special_tokens=False)["input_ids"],
    )


def length_buckets(encoded: Sequence[Encoded], batch_size: int) -> list[list[Encoded]]:
    """Group examples of like length, so that little is computed on padding."""
    by_length = sorted(encoded, key=len)
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def collate(rows: Sequence[Encoded], *, pad_id: int) -> Batch:
    """Pad rows on the left into one batch."""
    sequences = [row.prompt_ids + row.answer_ids for row in rows]
    labels = [[IGNORED] * len(row.prompt_ids) + row.answer_ids for row in rows]
    prompts = [row.prompt_ids for row in rows]
    return Batch(
        input_ids=_pad_left(sequences, pad_id),
        attention_mask=_mask(sequences),
        labels=_pad_left(labels, IGNORED),
        prompt_ids=_pad_left(prompts, pad_id),
        prompt_mask=_mask(prompts),
        prompts=[row.prompt for row in rows],
        expected=[row.expected for row in rows],
    )


def _pad_left(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[value] * (width - len(sequence)) + list(sequence) for sequence in sequences])


def _mask(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    return _pad_left([[1] * len(sequence) for sequence in sequences], 0)
