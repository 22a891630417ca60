"""Write the merged artifact: dense weights under the module's own keys, that open without this package.

The folder appears whole or not at all, and never in the place of another one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_lora.checkpoint import adapter_keys
from lightning_lora.dense_models import declare_dense
from lightning_lora.errors import LightningLoRAError, MergeError
from lightning_lora.fresh import is_pretrained_model
from lightning_lora.merging import MergeConfig, MergeReport, Norms, merged_weights, plain_weights
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.targets.patterns import canonical


def write_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Create a folder in one step: ``fill`` writes into a temporary one beside it, which is then renamed.

    Args:
        path: Where it should be; if that exists, ``-v1``, ``-v2``, ... is appended.
        fill: Writes the files.

    Returns:
        Where it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fill(temporary)
        temporary.chmod(0o777 & ~_umask())
        while True:
            target = unused_folder(path)
            try:
                temporary.rename(target)
            except OSError:
                if not target.exists():
                    raise
                continue  # another process took the name in between
            return target
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_merged(
    module: nn.Module,
    path: Path,
    config: MergeConfig,
    *,
    make_checkpoint: Callable[[dict[str, Tensor]], Mapping[str, Any]],
) -> Path:
    """Write the merged weights of a module with live adapters, which stays as it is.

    Args:
        module: The module; its keys are the keys of the file.
        path: The folder, see :func:`write_folder`.
        config: Its dtype.
        make_checkpoint: Gets the merged state dict and returns what ``merged.ckpt`` holds.

    Returns:
        The folder: ``merged.ckpt``, which the module's original class loads; for each transformers model inside the
        module a folder ``<its dotted name>/`` that ``from_pretrained`` opens.

    Raises:
        MergeError: If the folder can't be written.
    """
    state = merged_state_dict(module, config)

    def fill(folder: Path) -> None:
        torch.save(make_checkpoint(dict(state)), folder / "merged.ckpt")
        for name, model in _transformers_models(module):
            _save_pretrained(
                model, folder / (canonical(name).replace("/", "_") or "model"), _below(state, name), _tokenizers(module)
            )

    try:
        return write_folder(path, fill)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        if isinstance(error, LightningLoRAError):
            raise
        raise MergeError(
            f"The merged weights can't be written to {path}: {error}. The adapters are untouched, in the module and in "
            "the checkpoints."
        ) from error


def write_report(report: MergeReport, folder: Path) -> None:
    """Put the proof of a merge beside its weights, as ``merge_report.json``."""
    temporary = folder / ".merge_report.json"
    temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    temporary.replace(folder / "merge_report.json")


def merged_state_dict(module: nn.Module, config: MergeConfig) -> dict[str, Tensor]:
    """The state dict of ``module`` under its vanilla keys, with the active adapters folded in.

    Args:
        module: A module with live adapters.
        config: Its dtype is that of all floating-point entries; None keeps each as it is.

    Raises:
        MergeError: If the module's state dict has other names than its layers, so that weights can't be placed.
    """
    dtype = config.torch_dtype
    dropped = adapter_keys(module)
    names = {id(child): name for name, child in module.named_modules()}
    merged = {
        names[id(item.layer)]: item.layer.as_weight(item.dense) for item in merged_weights(module, config, Norms())
    }
    merged |= {name: dense for name, _, dense in plain_weights(module, config)}
    aliases = {
        f"{alias}.weight".lstrip("."): merged[names[id(child)]]
        for alias, child in module.named_modules(remove_duplicate=False)
        if names[id(child)] in merged
    }
    state = module.state_dict()
    lost = sorted((dropped | set(aliases)) - set(state))
    if lost:
        raise MergeError(
            f"{len(lost)} tensors of the adapted layers are not in the module's state dict, such as {lost[0]!r}: a "
            "state-dict hook or an own state_dict() renames or drops them, and the file would hold unmerged weights. "
            "Use merge_adapters(module), then save the module's state dict."
        )
    dropped |= _code_keys(module)
    state = {key: value for key, value in state.items() if key not in dropped}
    return {key: aliases[key] if key in aliases else _cast(value, dtype) for key, value in state.items()}


def _code_keys(module: nn.Module) -> set[str]:
    """Keys of what lies beside the codes of quantized layers, which a dense module has not."""
    return {
        f"{name}.{key}".lstrip(".")
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, QuantizedLayer)
        for key in child.code_keys()
    }


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(dtype)


def _below(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _transformers_models(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost transformers models inside ``module``."""
    found: list[str] = []
    for name, child in module.named_modules():
        if is_pretrained_model(child) and not any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            found.append(name)
            yield name, child


def _tokenizers(module: nn.Module) -> list[Any]:
    """Tokenizers and processors that the module holds as attributes: a model folder is of little use without them."""
    return [
        value
        for value in vars(module).values()
        if any(cls.__name__ in ("PreTrainedTokenizerBase", "ProcessorMixin") for cls in type(value).__mro__)
    ]


def _save_pretrained(model: Any, folder: Path, state: dict[str, Tensor], tokenizers: list[Any]) -> None:
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    restore = declare_dense(model)
    try:
        model.save_pretrained(folder, state_dict=dict(state))  # which empties the dict that it gets
    finally:
        restore()
    # save_pretrained notes the live model's dtype, from_pretrained casts to what is noted.
    noted = json.loads((folder / "config.json").read_text())
    noted.update({key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in noted})
    (folder / "config.json").write_text(json.dumps(noted, indent=2, sort_keys=True) + "\n")
    for tokenizer in tokenizers:
        tokenizer.save_pretrained(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def unused_folder(path: Path) -> Path:
    """``path``, or the first of ``path-v1``, ``path-v2``, ... where nothing is yet."""
    candidate, version = path, 0
    while candidate.exists():
        version += 1
        candidate = path.with_name(f"{path.name}-v{version}")
    return candidate
