"""Read named tensors of a base from safetensors, one at a time: a file, sharded ones, or a folder of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.errors import CheckpointError, MissingDependencyError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightFiles:
    """The tensors of a base on disk, by name.

    Args:
        source: A ``.safetensors`` file, an index of sharded ones (``.safetensors.index.json``), a folder with either,
            or the name of a model on the Hugging Face hub, whose safetensors files are fetched.

    Attributes:
        files: Name of each tensor -> the file that holds it.

    Raises:
        CheckpointError: If there is nothing to read, or a file is damaged.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source
        path = Path(source)
        if not path.exists():
            path = _fetch(str(source))
        self.files = dict(_names_in(_resolve(path)))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU: a view into the file, valid as long as it is held, so clone what is to stay."""
        # The file is opened anew for each: what was read before leaves the memory.
        tensor: Tensor = _opened(self.files[name]).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the head of its file."""
        return tuple(_opened(self.files[name]).get_slice(name).get_shape())


def _resolve(path: Path) -> list[Path]:
    if path.is_dir():
        candidates = [path / _INDEX, path / _SINGLE, *sorted(path.glob("*.safetensors"))]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise CheckpointError(
                f"{path} holds no safetensors file. Save the model with save_pretrained(..., safe_serialization=True)."
            )
        path = found
    if path.name.endswith(".index.json"):
        return _shards(path)
    return [path]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files ({type(error).__name__}: {error}).") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is not there: the folder is not complete.")
    return [index.parent / name for name in names]


def _names_in(files: list[Path]) -> Iterator[tuple[str, Path]]:
    for path in files:
        yield from ((name, path) for name in list(_opened(path).keys()))


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors: {error}") from None


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MissingDependencyError(
            f"There is no file or folder {name}; to fetch a model of that name: pip install 'lightning-lora[hf]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"There is no file or folder {name}, and no model of that name: {reason}") from None
