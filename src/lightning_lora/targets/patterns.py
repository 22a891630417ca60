"""The one rule by which a pattern matches a dotted name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
import sys
from collections.abc import Iterable

# No name begins with a dot, so a leading ".*" can't be a wildcard; elsewhere "layers.*.q_proj" is one.
_REGEX_CHARACTERS = re.compile(r"[\\^$()\[\]{}|+?]|^\.\*")
# Wrappers insert these into module names without being part of the user's model.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def canonical(name: str) -> str:
    """``name`` without what torch.compile and wrapper modules insert.

    Example:
        >>> canonical("model._orig_mod.layers.0")
        'model.layers.0'
    """
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS) if "_mod" in name else name
    return sys.intern(plain)  # one object per name: a checkpoint that mentions it often holds it once


@functools.cache
def _compiled(text: str) -> re.Pattern[str]:
    if _REGEX_CHARACTERS.search(text):
        try:
            return re.compile(text)
        except re.error as error:
            raise ValueError(f"pattern {text!r} is not a valid regular expression: {error}.") from None
    return re.compile(fnmatch.translate(text))


class Pattern:
    r"""A name, a wildcard or a regular expression; matches a dotted name or any ending of it that starts after a dot.

    Raises:
        ValueError: If the text looks like a regular expression and is none.

    Example:
        >>> Pattern("attn.q_proj").matches("model.layers.0.attn.q_proj")
        True
        >>> Pattern("proj").matches("model.layers.0.attn.q_proj")
        False
        >>> Pattern(r"layers\.[01]\..*_proj").matches("model.layers.1.attn.q_proj")
        True
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._regex = _compiled(text)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the dotted ``name``."""
        name = canonical(name)
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        return any(self._regex.fullmatch(name, start) for start in starts)

    def nearest(self, names: Iterable[str], count: int = 3) -> list[str]:
        """The names closest to this pattern, for a message: endings of as many parts as the pattern has."""
        parts = self.text.count(".") + 1
        endings = {".".join(canonical(name).split(".")[-parts:]) for name in names}
        endings |= {canonical(name).rpartition(".")[2] for name in names}
        return difflib.get_close_matches(self.text, sorted(endings - {""}), n=count, cutoff=0.3)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the patterns matches the dotted ``name``."""
    return any(Pattern(text).matches(name) for text in patterns)
