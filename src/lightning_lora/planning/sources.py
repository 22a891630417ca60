"""The module of a plan: the user's own, or one built without memory from a transformers config or a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import MissingDependencyError


def as_module(source: nn.Module | str | Path | Any) -> nn.Module:
    """The module to plan for; no weights are read, fetched or allocated.

    Args:
        source: A module on any device; a transformers config; a folder with a ``config.json``; or a name on the Hugging
            Face hub, of which the config alone is fetched.

    Raises:
        ValueError: If it is none of these, or no model class is known for the config.
        MissingDependencyError: If transformers is needed and not installed.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, (str, Path)):
        return from_config(_read_config(source))
    if hasattr(source, "model_type") and hasattr(source, "to_dict"):
        return from_config(source)
    raise ValueError(
        "plan_memory needs an nn.Module, a transformers config, a folder with a config.json, or a hub name; got "
        f"{type(source).__name__}."
    )


def from_config(config: Any) -> nn.Module:
    """Build the model of a transformers config on the meta device, in the config's dtype (fp32 if it says none).

    The class is the first of ``config.architectures`` where that is one with a loss, else the causal language model. It
    is in eval mode, as ``from_pretrained`` returns it and Lightning keeps it.
    """
    transformers = _transformers()
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    cls = getattr(transformers, name, None) if "For" in name or name.endswith("LMHeadModel") else None
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        if cls is not None:
            model: nn.Module = cls(config)
        elif type(config) in transformers.AutoModelForCausalLM._model_mapping:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            raise ValueError(
                f"config.architectures of {type(config).__name__} names no model class with a loss, and it has no "
                "causal language model. Build the module under torch.device('meta') and pass that."
            )
    return model.to(dtype).eval()


def _read_config(source: str | Path) -> Any:
    transformers = _transformers()
    folder = Path(source)
    if isinstance(source, Path) or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"plan_memory: there is no config.json in {str(folder)!r}.")
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    try:
        return transformers.AutoConfig.from_pretrained(str(source))
    except OSError as error:
        raise ValueError(
            f"plan_memory: {source!r} is no folder, and its config cannot be had from the Hugging Face hub "
            f"({str(error).splitlines()[0]})."
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "plan_memory builds models of a config with transformers: pip install 'lightning-lora[hf]'"
        ) from error
    return transformers
