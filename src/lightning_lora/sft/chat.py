"""One question and its answer, and the chat form in which the model reads them.

The form is ChatML without a system turn, as short as it can be: on a CPU every token of it costs time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

END_OF_TURN = "<|im_end|>"
_USER = "<|im_start|>user\n"
_ASSISTANT = f"{END_OF_TURN}\n<|im_start|>assistant\n"


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the model is given and what it should say.

    Attributes:
        text: The message or request.
        answer: The JSON that is expected, as text.
    """

    text: str
    answer: str


def answer_json(value: Any) -> str:
    """Return a value as one line of JSON without white space: a fifth fewer tokens to learn and to generate."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def chat_prompt(text: str, *, instruction: str, shots: tuple[Example, ...] = ()) -> str:
    """Return the text up to the point where the model answers.

    Args:
        text: The message or request.
        instruction: What the user asks for, with ``{text}`` where the message goes.
        shots: Solved examples that go before, for measuring what prompting alone gives.
    """
    turns = [_turn(shot.text, instruction) + shot.answer + f"{END_OF_TURN}\n" for shot in shots]
    return "".join(turns) + _turn(text, instruction)


def shown_prompt(prompt: str) -> str:
    """Return the last user turn of a prompt without the chat form, for people to read."""
    return prompt.rsplit(_USER, 1)[-1].removesuffix(_ASSISTANT)


def _turn(text: str, instruction: str) -> str:
    return _USER + instruction.replace("{text}", text) + _ASSISTANT
