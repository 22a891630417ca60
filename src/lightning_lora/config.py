"""What every kind of adapter shares in its configuration: which layers it goes to, and what is trained beside it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning_lora.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    r"""Base of the configs of all adapter kinds.

    A *pattern* is one rule everywhere: it matches a module's dotted name, or any ending of it that starts after a dot.
    It is a plain name (``"q_proj"``, ``"attn.proj"``), a wildcard (``"layers.*.q_proj"``), or a regular expression
    when it holds any of ``\ ^ $ ( ) [ ] { } | + ?`` or starts with ``.*`` (``"layers\.[0-3]\..*_proj"``).

    Attributes:
        rank: Inner dimension of the update.
        alpha: Numerator of the scaling of the update.
        target_modules: A preset (``"all-linear"``, ``"attention"``, ``"attention-qv"``, ``"mlp"``), a pattern, or a
            list of both.
        exclude_modules: Patterns of modules that stay as they are.
        layers: Which blocks of every block list (``nn.ModuleList`` or ``nn.Sequential`` of repeated blocks) to adapt:
            indices (negative ones count from the end), inclusive ranges such as ``"4-7"``, ``"last-half"``,
            ``"every-other"``, or a list of those. ``None``: all.
        rank_pattern: Rank by pattern, the first that matches a layer; the others get ``rank``.
        alpha_pattern: The same for ``alpha``.
        modules_to_save: Patterns of modules or parameters that are trained in full and saved beside the adapters, such
            as a new head. What transformers reports as newly initialised is added by itself.
        seed: Seed of the initialisation; the same on every rank, independent of the global random stream.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: tuple[str, ...] = ()
    layers: str | int | tuple[str | int, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._set("target_modules", as_patterns("target_modules", self.target_modules))
        if not self.target_modules:
            raise ValueError('target_modules is empty: name at least one layer, or use a preset such as "all-linear".')
        self._set("exclude_modules", as_patterns("exclude_modules", self.exclude_modules))
        self._set("modules_to_save", as_patterns("modules_to_save", self.modules_to_save))
        self._set("layers", _layer_selection(self.layers))
        check_rank("rank", self.rank)
        self._set("alpha", check_alpha("alpha", self.alpha))
        for field, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            self._set(field, _by_pattern(field, getattr(self, field), check))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}.")

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)  # the frozen dataclass way to normalise a field

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of the kind of adapter in reports and manifests, such as ``"lora"``."""

    @abstractmethod
    def make_adapter(self, layer: nn.Module, *, layer_name: str, rank: int, alpha: float) -> Adapter:
        """Build the adapter of one layer.

        Args:
            layer: The layer, already an :class:`~lightning_lora.layers.AdaptedLayer`.
            layer_name: Its dotted name, which seeds the initialisation.
            rank: Its rank, after ``rank_pattern``.
            alpha: Its alpha, after ``alpha_pattern``.
        """

    def to_dict(self) -> dict[str, Any]:
        """The config as plain dicts, lists, strings and numbers, with its kind."""
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **values}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def as_patterns(field: str, value: Any) -> str | tuple[str, ...]:
    """Normalise a pattern or a sequence of patterns (OmegaConf lists too) to a tuple of strings."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{field} must be a string or a list of strings, got {value!r}.")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ValueError(f"{field} must hold non-empty strings, got {pattern!r}.")
    return patterns


def _layer_selection(value: Any) -> tuple[str | int, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, (str, int)) else tuple(value) if isinstance(value, Iterable) else None
    if not items or any(isinstance(item, bool) or not isinstance(item, (str, int)) for item in items):
        raise ValueError(
            'layers must be None, an index, a range such as "4-7", "last-half", "every-other", or a non-empty list '
            f"of those; got {value!r}."
        )
    return items


def _by_pattern(field: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} must map patterns to values, got {value!r}.")
    for pattern in value:
        as_patterns(f"keys of {field}", pattern)
    return {pattern: check(f"{field}[{pattern!r}]", item) for pattern, item in value.items()}


def check_rank(name: str, value: Any) -> int:
    """Return ``value`` if it is a rank, a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return value


def check_alpha(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}.")
    return float(value)
