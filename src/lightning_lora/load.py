"""The twin of ``LightningModule.load_from_checkpoint`` for adapter-only files."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from lightning_lora.checkpoint import complete_base, read_manifest
from lightning_lora.checkpoint_file import read_checkpoint
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import AdapterMismatchError, CheckpointError
from lightning_lora.injection import extend_adapters
from lightning_lora.lora import LoRAConfig
from lightning_lora.quantization.config import QuantizationConfig, as_quantization_config

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)
KINDS: dict[str, type[AdapterConfig]] = {"lora": LoRAConfig}


def load_from_checkpoint(
    module_class: type[ModuleT],
    path: Any,
    *,
    map_location: Any = None,
    base_weights: str | Path | None = None,
    **init_kwargs: Any,
) -> ModuleT:
    """Build a LightningModule with its base, put in the adapters that an adapter-only checkpoint holds, and load them.

    ``module_class.load_from_checkpoint`` can't read such a file: it knows nothing of the adapters.

    Args:
        module_class: The user's own class.
        path: A checkpoint that a run with :class:`~lightning_lora.LoRACallback` saved.
        map_location: Where the tensors go, as in ``torch.load``.
        base_weights: Where a module that is built without values gets its weights from, as in
            :func:`~lightning_lora.inject_adapters`.
        init_kwargs: Arguments of the class that the checkpoint's hyper-parameters lack or that replace them.

    Returns:
        The module with its adapters active, in train mode as Lightning's own method leaves it.

    Raises:
        CheckpointError: If the file is no adapter checkpoint, or arguments are missing.
        AdapterMismatchError: If the adapters do not fit the module; BaseMismatchError: if its base is another one.
    """
    checkpoint = read_checkpoint(path)
    manifest = read_manifest(checkpoint)
    _check_arguments(module_class, checkpoint, manifest, init_kwargs)
    arguments = {**_rewrapped(module_class, checkpoint, manifest), **init_kwargs}
    if "weights_only" in inspect.signature(module_class.load_from_checkpoint).parameters:  # from lightning 2.6 on
        arguments["weights_only"] = True
    with _injecting(module_class, manifest, base_weights):
        return module_class.load_from_checkpoint(path, map_location=map_location, **arguments)


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """The adapter config that :meth:`~lightning_lora.config.AdapterConfig.to_dict` wrote down."""
    fields = dict(values)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise CheckpointError(f"The file holds adapters of kind {kind!r}; this version knows {', '.join(KINDS)}.")
    try:
        return KINDS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The adapter config in the file is damaged: {error}") from None


def quantization_from_dict(values: dict[str, Any] | None) -> QuantizationConfig | None:
    """The config that :meth:`~lightning_lora.QuantizationConfig.to_dict` wrote down."""
    try:
        return as_quantization_config(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The quantization config in the file is damaged: {error}") from None


def _inject(module: pl.LightningModule, config: AdapterConfig, name: Any, **base: Any) -> None:
    try:
        extend_adapters(module, config, name=str(name), strict=True, **base)
    except ValueError as error:
        raise AdapterMismatchError(
            f"The adapters in this checkpoint do not fit {type(module).__name__}: {error}"
        ) from None


@contextmanager
def _injecting(
    module_class: type[pl.LightningModule], manifest: dict[str, Any], base_weights: str | Path | None
) -> Iterator[None]:
    # Lightning gives a class no moment between building the module and load_state_dict but this hook.
    own = module_class.__dict__.get("on_load_checkpoint")
    inherited = module_class.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        dtype = manifest.get("quantized_from")
        base = {
            "quantization": quantization_from_dict(manifest.get("quantization")),
            "rounded_to": None if dtype is None else getattr(torch, dtype),
            "base_weights": base_weights,
        }
        for name, config in manifest["configs"].items():
            _inject(self, config_from_dict(config), name, **base)
        complete_base(self, checkpoint)
        inherited(self, checkpoint)

    module_class.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module_class.on_load_checkpoint
        else:
            module_class.on_load_checkpoint = own  # type: ignore[method-assign]


def _check_arguments(
    module_class: type[pl.LightningModule],
    checkpoint: dict[str, Any],
    manifest: dict[str, Any],
    init_kwargs: dict[str, Any],
) -> None:
    parameters = inspect.signature(module_class.__init__).parameters
    left_out = manifest.get("hyper_parameters", {}).get("left_out", [])
    whole = checkpoint.get("hparams_name")
    if left_out and whole in parameters:
        left_out = [whole]  # the class takes them as one argument, which is incomplete
    missing = [
        name
        for name in left_out
        if name in parameters and parameters[name].default is inspect.Parameter.empty and name not in init_kwargs
    ]
    if missing:
        raise CheckpointError(
            f"{module_class.__name__} needs {', '.join(missing)}, which the checkpoint does not hold because it is no "
            f"plain value. Pass it: load_from_checkpoint({module_class.__name__}, path, {missing[0]}=...)."
        )


def _rewrapped(
    module_class: type[pl.LightningModule], checkpoint: dict[str, Any], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Hyper-parameters that were OmegaConf nodes, as nodes again: the class may read them by attribute."""
    names = manifest.get("hyper_parameters", {}).get("omegaconf", [])
    values = checkpoint.get("hyper_parameters", {})
    wanted = {name: values[name] for name in names if name in values}
    whole = checkpoint.get("hparams_name")
    if "*" in names and whole in inspect.signature(module_class.__init__).parameters:
        wanted = {whole: values}
    if not wanted:
        return {}
    from omegaconf import OmegaConf

    return {name: OmegaConf.create(value) for name, value in wanted.items()}
