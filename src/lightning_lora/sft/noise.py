"""The untidiness of real messages: typing errors, casing, and serials in every form but the right one."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_WORD = re.compile(r"(?<![{\w])[a-z]{5,}(?![}\w])")  # never a placeholder, never a short word


def with_typo(rng: random.Random, text: str, *, probability: float = 0.08) -> str:
    """Misspell one longer word of a wording now and then; placeholders such as ``{m}`` stay whole."""
    words = list(_WORD.finditer(text))
    if not words or rng.random() >= probability:
        return text
    word = rng.choice(words)
    return text[: word.start()] + _misspell(rng, word.group()) + text[word.end() :]


def _misspell(rng: random.Random, word: str) -> str:
    at = rng.randrange(1, len(word) - 1)
    slips = (
        word[:at] + word[at + 1 :],  # a letter dropped
        word[:at] + word[at] + word[at:],  # a letter twice
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],  # two letters swapped
    )
    return rng.choice(slips)


def casing_of(rng: random.Random, text: str, *, lowered: float = 0.12) -> str:
    """Return the text as it is, or now and then all in small letters, as people type on a phone."""
    return text.lower() if rng.random() < lowered else text


def write_serials(rng: random.Random, serials: Sequence[str]) -> str:
    """List serials as customers do: with or without the dash, joined by commas, "and" or "&"."""
    separator = rng.choices(("-", " ", ""), weights=(6, 2, 2))[0]
    written = [number.replace("-", separator) for number in serials]
    if rng.random() < 0.2:
        written = [number.lower() for number in written]
    if len(written) < 2:
        return "".join(written)
    last = rng.choice((" and ", " & ", ", "))
    return ", ".join(written[:-1]) + last + written[-1]
