"""From examples to padded batches, with labels on the answers only.

Everything is padded on the left, for training as for generation: the model sees prompts in the same form when it learns
and when it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from lightning_lora.sft.chat import END_OF_TURN

IGNORED = -100  # the label that cross_entropy leaves out


class Batch(TypedDict):
    """One batch of N examples in B rows; T tokens of prompts and answers, P of one prompt alone, all int64.

    B is less than N where short examples share a row: each starts again at position 0, and no mask is needed.
    """

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor | None  # (B, T), None where examples share rows
    position_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), IGNORED outside the answers
    prompt_ids: torch.Tensor  # (N, P)
    prompt_mask: torch.Tensor  # (N, P)
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


def collate(examples: Sequence[Encoded], *, pad_id: int) -> Batch:
    """Pad examples on the left into one batch, each in a row of its own."""
    batch = collate_packed([[example] for example in examples], pad_id=pad_id)
    mask = _mask([example.prompt_ids + example.answer_ids for example in examples])
    batch["attention_mask"] = mask
    batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return batch


def collate_packed(rows: Sequence[Sequence[Encoded]], *, pad_id: int) -> Batch:
    """Lay the examples of a row one after the other, and pad the rows on the left.

    A model tells the examples of a row apart by their positions; the padding counts as one more of them.
    """
    examples = [example for row in rows for example in row]
    prompts = [example.prompt_ids for example in examples]
    widest = max(sum(map(len, row)) for row in rows)
    paddings = [widest - sum(map(len, row)) for row in rows]
    return Batch(
        input_ids=_pad_left([[i for e in row for i in e.prompt_ids + e.answer_ids] for row in rows], pad_id),
        attention_mask=None,
        position_ids=torch.tensor(
            [_positions([left, *map(len, row)]) for left, row in zip(paddings, rows, strict=True)]
        ),
        labels=_pad_left([[label for example in row for label in _labels(example)] for row in rows], IGNORED),
        prompt_ids=_pad_left(prompts, pad_id),
        prompt_mask=_mask(prompts),
        prompts=[example.prompt for example in examples],
        expected=[example.expected for example in examples],
    )


def _labels(example: Encoded) -> list[int]:
    labels = [IGNORED] * len(example.prompt_ids) + example.answer_ids
    return [IGNORED, *labels[1:]]  # nothing of the example stands before its first token


def _positions(lengths: Sequence[int]) -> list[int]:
    return [position for length in lengths for position in range(length)]


def _pad_left(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[value] * (width - len(sequence)) + list(sequence) for sequence in sequences])


def _mask(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    return _pad_left([[1] * len(sequence) for sequence in sequences], 0)
