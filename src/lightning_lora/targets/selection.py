"""Choose the layers: candidates, patterns and presets, then exclusions, blocks, ranks. Changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_lora.class_swap import original_class
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import TargetNotFoundError, UnsupportedSetupError
from lightning_lora.layers import AdaptedLayer, host_of
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.targets.blocks import BlockLists
from lightning_lora.targets.patterns import Pattern, canonical
from lightning_lora.targets.roles import Roles, prefixes

ValueT = TypeVar("ValueT")
PRESETS: Mapping[str, Callable[[Roles, str], bool]] = {
    "all-linear": lambda roles, name: True,
    "attention": Roles.is_attention,
    "attention-qv": Roles.is_query_or_value,
    "mlp": Roles.is_feed_forward,
}


@dataclass(frozen=True)
class Target:
    """One layer to adapt, with its rank and alpha."""

    name: str
    rank: int
    alpha: float


@dataclass
class Selection:
    """The layers to adapt, in module order, and why others that could have been meant stay as they are."""

    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def select_targets(
    module: nn.Module, config: AdapterConfig, *, saved: frozenset[str] = frozenset(), strict: bool = True
) -> Selection:
    """Choose the layers of ``module`` that ``config`` means.

    Args:
        module: The root; names are relative to it.
        config: What to adapt.
        saved: Names of modules that are trained in full, which therefore get no adapters.
        strict: Refuse patterns that match nothing, and an empty selection. False while the module is not complete yet.

    Raises:
        TargetNotFoundError: If a pattern matches nothing or only what cannot be adapted, or nothing is selected.
        UnsupportedSetupError: If a layer that is asked for by name cannot be adapted rightly.
        ValueError: If ``layers`` does not fit the module.
    """
    return _Selector(module, config, saved).select(strict=strict)


class _Selector:
    def __init__(self, module: nn.Module, config: AdapterConfig, saved: frozenset[str]) -> None:
        self.module, self.config = module, config
        self.names: dict[int, list[str]] = defaultdict(list)  # a shared module has several names
        self.modules: dict[str, nn.Module] = {}
        for name, child in module.named_modules(remove_duplicate=False):
            if not self.names[id(child)]:
                self.modules[name] = child
            self.names[id(child)].append(name)
        self.blockers = _blockers(module, self.modules, saved)
        self.layers = [name for name, child in self.modules.items() if host_of(child) is not None]
        self.blocks = BlockLists(module, self.layers)
        self.roles = Roles(module, self.blocks.block_names)

    def select(self, *, strict: bool) -> Selection:
        selection = Selection()
        chosen = self._chosen(selection, strict=strict)
        chosen = [name for name in chosen if not self._excluded(name, selection, strict=strict)]
        chosen = self._in_layers(chosen, selection, strict=strict)
        if strict and not chosen:
            raise TargetNotFoundError(self._nothing_message(selection))
        selection.targets = [
            Target(
                name,
                rank=self._by_pattern(name, self.config.rank_pattern, self.config.rank),
                alpha=self._by_pattern(name, self.config.alpha_pattern, self.config.alpha),
            )
            for name in chosen
        ]
        if strict:
            self._refuse_idle_patterns("rank_pattern", self.config.rank_pattern, chosen)
            self._refuse_idle_patterns("alpha_pattern", self.config.alpha_pattern, chosen)
        return selection

    def _chosen(self, selection: Selection, *, strict: bool) -> list[str]:
        meant: set[str] = set()
        for text in self.config.target_modules:
            if text in PRESETS:
                meant |= self._by_preset(text, selection, strict=strict)
            else:
                meant |= self._by_name(Pattern(text), selection, strict=strict)
        return [name for name in self.layers if name in meant]

    def _by_preset(self, preset: str, selection: Selection, *, strict: bool) -> set[str]:
        meant: set[str] = set()
        for name in self.layers:
            if not PRESETS[preset](self.roles, name):
                continue
            if name in self.blockers:
                selection.skipped[name] = self.blockers[name]
            elif self.roles.is_output_head(name):
                selection.skipped[name] = "output head (name it in target_modules or modules_to_save to train it)"
            else:
                meant.add(name)
        if preset in ("all-linear", "mlp"):
            selection.skipped.update(_packed(self.modules))
        if strict and not meant:
            raise TargetNotFoundError(
                f"target_modules={preset!r} selects no layer of {type(self.module).__name__}. "
                + self._nothing_message(selection)
            )
        return meant

    def _by_name(self, pattern: Pattern, selection: Selection, *, strict: bool) -> set[str]:
        matched = [name for name in self.modules if self._matches(pattern, name)]
        usable = {name for name in matched if name in self.layers and name not in self.blockers}
        for name in matched:
            if name in self.blockers:
                selection.skipped[name] = self.blockers[name]
        if strict and not matched:
            nearest = pattern.nearest([*self.layers, *PRESETS])
            hint = f"Closest: {', '.join(map(repr, nearest))}." if nearest else self._layers_hint()
            raise TargetNotFoundError(
                f"target_modules: {pattern.text!r} matches no module of {type(self.module).__name__}. {hint}"
            )
        if strict and not usable:
            raise TargetNotFoundError(self._unusable_message(pattern, matched))
        return usable

    def _unusable_message(self, pattern: Pattern, matched: list[str]) -> str:
        name = matched[0]
        if name in self.blockers:
            return f"target_modules: {pattern.text!r} matches {name!r}, which cannot be adapted: {self.blockers[name]}."
        inside = [layer for layer in self.layers if layer.startswith(name + ".") and layer not in self.blockers]
        hint = f" Name the layers inside it, such as {inside[0]!r}." if inside else ""
        return (
            f"target_modules: {pattern.text!r} matches {name!r} of type {type(self.modules[name]).__name__}, which "
            f"cannot carry an adapter; nn.Linear and transformers' Conv1D can.{hint}"
        )

    def _excluded(self, name: str, selection: Selection, *, strict: bool) -> bool:
        for text in self.config.exclude_modules:
            pattern = Pattern(text)
            if strict and not any(self._matches(pattern, other) for other in self.modules):
                nearest = ", ".join(map(repr, pattern.nearest(self.layers)))
                raise TargetNotFoundError(f"exclude_modules: {text!r} matches no module. Closest: {nearest}.")
            # A pattern that names a module excludes what is inside it, too.
            if any(pattern.matches(part) for alias in self._aliases(name) for part in prefixes(alias)):
                selection.skipped[name] = f"excluded by {text!r}"
                return True
        return False

    def _in_layers(self, chosen: list[str], selection: Selection, *, strict: bool) -> list[str]:
        if self.config.layers is None or not (chosen or strict):
            return chosen
        assert isinstance(self.config.layers, tuple)
        try:
            kept = BlockLists(self.module, chosen, alike=True).select(self.config.layers)
        except ValueError:
            if strict:
                raise
            return []
        for name in chosen:
            if name not in kept:
                selection.skipped[name] = f"outside layers={list(self.config.layers)}"
        return [name for name in chosen if name in kept]

    def _by_pattern(self, name: str, values: Mapping[str, ValueT], default: ValueT) -> ValueT:
        for text, value in values.items():
            if self._matches(Pattern(text), name):
                return value
        return default

    def _refuse_idle_patterns(self, field: str, values: Mapping[str, object], chosen: list[str]) -> None:
        for text in values:
            pattern = Pattern(text)
            if not any(self._matches(pattern, name) for name in chosen):
                nearest = ", ".join(map(repr, pattern.nearest(chosen)))
                raise TargetNotFoundError(f"{field}: {text!r} matches no adapted layer. Closest: {nearest}.")

    def _matches(self, pattern: Pattern, name: str) -> bool:
        return any(pattern.matches(alias) for alias in self._aliases(name))

    def _aliases(self, name: str) -> list[str]:
        return self.names[id(self.modules[name])]

    def _nothing_message(self, selection: Selection) -> str:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(selection.skipped.items())[:3])
        return f"Not adapted: {reasons}." if reasons else self._layers_hint()

    def _layers_hint(self) -> str:
        scripted = [name for name, child in self.modules.items() if isinstance(child, torch.jit.ScriptModule)]
        if scripted:
            return f"{scripted[0]!r} is a ScriptModule, whose layers cannot be adapted: pass the eager module."
        if not self.layers:
            return (
                "It has no nn.Linear and no transformers Conv1D. If its layers are built later, "
                "build them in configure_model() or setup()."
            )
        endings = sorted({canonical(name).rpartition(".")[2] for name in self.layers})
        return f"Its layers that can be adapted end in: {', '.join(endings[:12])}."


def _packed(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Modules that compute with matrices stacked in one parameter, as experts are in transformers, with the reason."""
    packed: dict[str, str] = {}
    for name, child in modules.items():
        if isinstance(child, (nn.modules.conv._ConvNd, parametrize.ParametrizationList)):
            continue
        stacked = [key for key, p in child._parameters.items() if p is not None and p.ndim == 3 and min(p.shape) > 1]
        if stacked:
            packed[name] = f"matrices stacked in one parameter ({', '.join(stacked)}) cannot be adapted"
    return packed


def _blockers(root: nn.Module, modules: Mapping[str, nn.Module], saved: frozenset[str]) -> dict[str, str]:
    """Layers that could carry an adapter by their type, but not rightly, with the reason."""
    shared = _shared_weights(root)
    inside_attention = {id(child.out_proj) for child in modules.values() if isinstance(child, nn.MultiheadAttention)}
    blockers: dict[str, str] = {}
    _refuse_lazy(modules)
    for name, layer in modules.items():
        if host_of(layer) is None:
            continue
        weight = getattr(layer, "weight", None)
        if any(name == other or name.startswith(other + ".") for other in saved):
            blockers[name] = "trained in full (modules_to_save)"
        elif id(layer) in inside_attention:
            blockers[name] = "nn.MultiheadAttention uses this weight without calling the layer"
        elif "_hf_hook" in vars(layer):
            blockers[name] = "accelerate runs its forward (device_map); load the model without, or remove its hooks"
        elif parametrize.is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), nn.Parameter):
            blockers[name] = "its weight is computed from others (weight_norm, spectral_norm, pruning): undo that first"
        elif not isinstance(layer, QuantizedLayer) and not (
            isinstance(weight, torch.Tensor) and weight.is_floating_point()
        ):
            blockers[name] = f"its weight is not a dense floating-point tensor ({original_class(layer).__name__})"
        elif id(weight) in shared:
            others = " and ".join(repr(owner) for owner in shared[id(weight)] if owner != name)
            blockers[name] = f"its weight is tied to {others}; merging would change both. Untie it first"
        elif not isinstance(layer, AdaptedLayer) and (hasattr(layer, "adapters") or hasattr(layer, "active")):
            blockers[name] = "it has an attribute 'adapters' or 'active' of its own"
    return blockers


def _refuse_lazy(modules: Mapping[str, nn.Module]) -> None:
    for name, layer in modules.items():
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise UnsupportedSetupError(
                f"{name!r} is a lazy layer whose shape is not known yet. Run one batch through the module before fit, "
                "or give the layer its sizes."
            )


def _shared_weights(root: nn.Module) -> dict[int, list[str]]:
    """Parameters that more than one module object owns: id -> the owners' names."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, child in root.named_modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}
