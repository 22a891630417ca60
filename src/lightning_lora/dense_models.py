"""transformers models whose layers are dense, whatever their config says: it decides how they are saved and opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.fresh import is_pretrained_model

_ATTRIBUTES = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def declare_dense(module: nn.Module) -> Callable[[], None]:
    """Take off the transformers models inside ``module`` what says that they are quantized; returns how to undo it.

    transformers refuses to save a model that it dequantized on loading (GGUF), writes the quantization config beside
    dense weights, and then can't open what it wrote.
    """
    undo = [_declare(child) for child in module.modules() if is_pretrained_model(child)]

    def restore() -> None:
        for function in undo:
            function()

    return restore


def _declare(model: Any) -> Callable[[], None]:
    config = model.config
    kept = {name: vars(model)[name] for name in _ATTRIBUTES if name in vars(model)}
    quantization = vars(config).pop("quantization_config", None)
    for name in kept:
        delattr(model, name)

    def restore() -> None:
        for name, value in kept.items():
            setattr(model, name, value)
        if quantization is not None:
            config.quantization_config = quantization

    return restore
