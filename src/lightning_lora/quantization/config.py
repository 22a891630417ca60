"""How a frozen base is stored in 4, 8 or 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lora.config import as_patterns

BITS = {"nf4": 4, "fp4": 4, "int8": 8, "bf16": 16}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE_DTYPES = {"uint8": torch.uint8, **COMPUTE_DTYPES}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Store the frozen linear layers of the base in 4 or 8 bits, with bitsandbytes (QLoRA, arXiv:2305.14314), or in 16.

    All frozen linear layers are stored so, adapted or not; never output heads, embeddings, tied weights, adapters, or
    what is trained in full.

    Attributes:
        quant_type: ``"nf4"`` (4-bit NormalFloat, arXiv:2305.14314, section 3), ``"fp4"`` (4-bit float), ``"int8"`` (one
            scale a row, as the weights of LLM.int8(), arXiv:2208.07339, section 2; inputs stay in 16 or 32 bits), or
            ``"bf16"``, which changes nothing of what an fp32 base computes under bf16 autocast (unless the module casts
            activations to the dtype of a layer's weight: name that layer in ``skip_modules``).
        double_quant: Store the constants of the 4-bit blocks in 8 bits, too (arXiv:2305.14314, section 3): 0.37 bits
            less a parameter at ``block_size=64``.
        block_size: Values that share one constant, of 4-bit types.
        clip_search: Clip the values of a 4-bit block where that makes its squared error smaller, see
            :mod:`lightning_lora.quantization.clipping`. Quantizing takes some eight times as long; what is stored has
            the same form and size.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, in which the products with the dequantized
            weights run; None: autocast's under autocast, else that of the layer's input.
        storage_dtype: Dtype of the tensors that hold the 4-bit codes, ``"uint8"``, ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. A floating-point one is for strategies that can only shard such tensors.
        skip_modules: Patterns of layers that stay dense, as in
            :class:`~lightning_lora.config.AdapterConfig`.

    Raises:
        ValueError: For a value that has no meaning; the message names the field.

    Example:
        >>> QuantizationConfig(double_quant=True).bits_per_parameter
        4.127
    """

    quant_type: str = "nf4"
    double_quant: bool = False
    block_size: int = 64
    clip_search: bool = False
    compute_dtype: str | None = None
    storage_dtype: str = "uint8"
    skip_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("quant_type", self.quant_type, tuple(BITS)),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("compute_dtype", self.compute_dtype, (None, *COMPUTE_DTYPES)),
            ("storage_dtype", self.storage_dtype, tuple(STORAGE_DTYPES)),
        ):
            if isinstance(value, (bool, float)) or value not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; got {value!r}.")
        for field, chosen in (("double_quant", self.double_quant), ("clip_search", self.clip_search)):
            if not isinstance(chosen, bool):
                raise ValueError(f"{field} must be True or False, got {chosen!r}.")
            if chosen and BITS[self.quant_type] != 4:
                raise ValueError(f'{field} is for 4-bit types, not for quant_type="{self.quant_type}".')
        object.__setattr__(self, "skip_modules", as_patterns("skip_modules", self.skip_modules))

    @property
    def bits_per_parameter(self) -> float:
        """Bits that a weight takes with its block's constants; of ``"int8"`` without the 32 bits of each row."""
        if BITS[self.quant_type] != 4:
            return float(BITS[self.quant_type])
        constants = 8 / self.block_size + 32 / (self.block_size * 256) if self.double_quant else 32 / self.block_size
        return round(4 + constants, 4)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain dicts, lists, strings and numbers."""
        values = dataclasses.asdict(self)
        return {**values, "skip_modules": list(self.skip_modules)}


def as_quantization_config(value: Any) -> QuantizationConfig | None:
    """Accept what Hydra makes of a nested node without ``_target_``, too."""
    if isinstance(value, Mapping):
        return QuantizationConfig(**{str(key): item for key, item in value.items() if key != "_target_"})
    if value is not None and not isinstance(value, QuantizationConfig):
        raise ValueError(f"quantization must be None or a QuantizationConfig, got {value!r}.")
    return value
