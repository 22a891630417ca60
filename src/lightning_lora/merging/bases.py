"""What the update is added to in a merge: the weight that the adapters were trained on, or the one from before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import MergeError
from lightning_lora.fresh import is_pretrained_model
from lightning_lora.layers import AdaptedLayer
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.streaming import match_names
from lightning_lora.weight_files import WeightFiles

BASES = ("dequantized", "original", "requantized")
# Of |W|: NF4 and FP4 change 9 to 12 % of a weight (with blocks of 4096 values 17 %), another model's weight 140 %.
_FARTHEST = 0.4


Layer = AdaptedLayer | QuantizedLayer


def live_weight(name: str, layer: Layer) -> Tensor:
    """The weight that the adapters were trained on, ``(out_features, in_features)``."""
    if isinstance(layer, AdaptedLayer):
        return layer.weight_matrix().detach()
    return layer.dense_weight()


def original_weights(module: nn.Module, source: str | None) -> Callable[[str, Layer], Tensor]:
    """Reads the weights that the base of ``module`` was quantized from, fp32, one at a time.

    Args:
        module: A module with adapters.
        source: As of :class:`~lightning_lora.weight_files.WeightFiles`; None: where transformers loaded the model from.

    Raises:
        MergeError: If there is no source, or it does not hold these weights.
    """
    files = WeightFiles(source or _loaded_from(module))
    layers = [name for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)]
    keys = {f"{name}.weight".lstrip("."): name for name in layers}
    found = {keys[key]: stored for key, stored in match_names(module, files, keys).items()}
    missing = [name for name in layers if name not in found]
    if missing:
        raise MergeError(
            f"The original weight of {missing[0]!r} is not in {files.source}. Name the files of this base: "
            'MergeConfig(base="original", original=...), or merge into the dequantized base.'
        )

    def read(name: str, layer: Layer) -> Tensor:
        live = live_weight(name, layer)
        if name not in found:
            return live  # a layer that was not quantized is its own original
        weight = files.read(found[name]).to(device=live.device, dtype=torch.float32, copy=True)
        if weight.shape != live.shape or torch.linalg.vector_norm(weight - live) > _FARTHEST * live.norm():
            raise MergeError(
                f"{found[name]!r} in {files.source} is not what {name!r} was quantized from. Name the files of this "
                'base: MergeConfig(base="original", original=...). Nothing was changed.'
            )
        return weight

    return read


def _loaded_from(module: nn.Module) -> str:
    for child in module.modules():
        if is_pretrained_model(child):
            name = str(getattr(child.config, "_name_or_path", "") or "")
            if name and (Path(name).exists() or "/" in name):
                return name
    raise MergeError(
        'MergeConfig(base="original") needs the files of the base before it was quantized: name them, '
        'MergeConfig(base="original", original="folder or file or name on the hub").'
    )
