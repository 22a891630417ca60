"""The layers of LitGPT, torchtune and loralib in the place of a model's linear layers, over the same base weights.

Each is the package's own class, with adapters in the dtype of the base, as the packages make them. What they have
beyond the layer, such as models and recipes of their own, is not compared. ``requirements-peers.txt`` says how to
install them; what is absent is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import models

MakeLayer = Callable[[nn.Linear, models.Case], nn.Module]


def litgpt(linear: nn.Linear, case: models.Case) -> nn.Module:
    """``litgpt.lora.LoRALinear``."""
    from litgpt.lora import LoRALinear

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = LoRALinear(*sizes, r=case.rank, lora_alpha=case.alpha, lora_dropout=case.dropout, bias=has_bias)
    layer.linear.weight, layer.linear.bias = linear.weight, linear.bias
    return layer


def torchtune(linear: nn.Linear, case: models.Case) -> nn.Module:
    """``torchtune.modules.peft.LoRALinear``."""
    from torchtune.modules.peft import LoRALinear

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = LoRALinear(*sizes, rank=case.rank, alpha=case.alpha, dropout=case.dropout, use_bias=has_bias)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer


def loralib(linear: nn.Linear, case: models.Case) -> nn.Module:
    """``loralib.Linear``, told not to merge when it is evaluated: it would write to the weights that all share."""
    from loralib import Linear

    layer = Linear(
        linear.in_features,
        linear.out_features,
        r=case.rank,
        lora_alpha=case.alpha,
        lora_dropout=case.dropout,
        merge_weights=False,
        bias=linear.bias is not None,
    )
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer


PEERS: dict[str, MakeLayer] = {"litgpt": litgpt, "torchtune": torchtune, "loralib": loralib}


def installed() -> list[str]:
    """The peers that can be imported here."""
    return [name for name in PEERS if importlib.util.find_spec(name) is not None]


def with_peer(name: str, base: nn.Module, case: models.Case, *, like: nn.Module) -> nn.Module:
    """The model with a peer's layers where the PEFT model ``like`` has its own, holding the same A and B."""
    model = models.share(base).requires_grad_(False)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # as PEFT and transformers do
    values = models.peft_adapters(like)
    for target in sorted({layer for layer, _ in values}):
        layer = PEERS[name](model.get_submodule(target), case)
        for factor, parameter in factors(layer).items():
            parameter.data = values[target, factor].detach().to(case.dtype, copy=True)
        model.set_submodule(target, layer)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    return model.train()


def factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """``lora_A`` and ``lora_B`` of a peer's layer."""
    lora_A = layer.lora_A if hasattr(layer, "lora_A") else layer.lora_a.weight
    lora_B = layer.lora_B if hasattr(layer, "lora_B") else layer.lora_b.weight
    return {"lora_A": lora_A, "lora_B": lora_B}


def adapters(model: nn.Module) -> dict[tuple[str, str], torch.nn.Parameter]:
    """A and B of a model with a peer's layers by (layer, "lora_A" or "lora_B")."""
    found = {}
    for name, module in model.named_modules():
        if any(hasattr(module, attribute) for attribute in ("lora_A", "lora_a")):
            found |= {(name, factor): parameter for factor, parameter in factors(module).items()}
    return found
