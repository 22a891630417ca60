"""Find parameters that were never pretrained: a random head that stays frozen ruins a run without a word."""

from __future__ import annotations

from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.quantized_layer import QuantizedLayer


def newly_initialized(module: nn.Module) -> list[str]:
    """Names of the parameters that a transformers checkpoint did not hold, so that transformers drew them at random.

    ``from_pretrained`` marks each parameter that it loaded with ``_is_hf_initialized``; what it had to initialise
    has no mark. Without any mark (built from a config, copied, not of transformers) there is no evidence, and nothing
    is returned.
    """
    fresh: list[str] = []
    adapters = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, Adapter))
    for name, child in module.named_modules():
        if not is_pretrained_model(child) or any(name.startswith(f"{outer}.") for outer in fresh):
            continue
        # Codes have no mark; what was drawn at random is trained in full, and never quantized.
        codes = {id(inner.weight) for inner in child.modules() if isinstance(inner, QuantizedLayer)}
        parameters = [(key, p) for key, p in child.named_parameters() if id(p) not in codes]
        marks = {key: getattr(p, "_is_hf_initialized", False) for key, p in parameters}
        if any(marks.values()):
            unmarked = [f"{name}.{key}" if name else key for key, marked in marks.items() if not marked]
            fresh += [key for key in unmarked if not key.startswith(adapters)]
    return list(dict.fromkeys(fresh))


def is_pretrained_model(module: nn.Module) -> bool:
    """Whether ``module`` is a transformers model; transformers is not imported to recognise it."""
    return any(
        cls.__module__ == "transformers.modeling_utils" and cls.__name__ == "PreTrainedModel"
        for cls in type(module).__mro__
    )
