"""The variants under comparison, over one shared set of frozen base weights."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

PRECISIONS = ("bf16", "fp32", "bf16-mixed")
QUANTIZATIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "nf4": {"quant_type": "nf4"},
    "nf4-double": {"quant_type": "nf4", "double_quant": True},
    "bf16": {"quant_type": "bf16"},
}
TARGETS: dict[str, list[str]] = {"all-linear": [], "q+v": ["q_proj", "v_proj"]}  # all-linear: those of the shape
LAYERS = ("all", "last-half")
_PEFT_KEY = re.compile(r"^base_model\.model\.(?P<layer>.+)\.(?P<factor>lora_[AB])\.default\.weight$")
_OUR_KEY = re.compile(r"^(?P<layer>.+)\.adapters\.default\.(?P<factor>lora_[AB])$")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the weights are drawn at random, since time and bytes do not depend on them."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    key_value_heads: int
    vocabulary: int
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.feed_forward,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )

    def build(self) -> nn.Module:
        return LlamaForCausalLM(self.config())

    def inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random token ids, int64 ``[batch, length]``."""
        tokens = torch.randint(self.vocabulary, (batch, length), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision transformer for images of 224 x 224 in patches of 16 x 16: 197 tokens."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    classes: int
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

    def config(self) -> ViTConfig:
        return ViTConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.feed_forward,
            num_attention_heads=self.heads,
            num_labels=self.classes,
            attn_implementation="sdpa",
        )

    def build(self) -> nn.Module:
        return ViTForImageClassification(self.config())

    def inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images, float32 ``[batch, 3, 224, 224]``; they have no length."""
        images = torch.randn(batch, 3, 224, 224, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(self.classes, (batch,), generator=generator)}


SHAPES: dict[str, Shape | VisionShape] = {
    "llama-8x512": Shape(512, 8, 1376, 8, 8, 4096),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 49152),
    "llama-7b": Shape(4096, 32, 11008, 32, 32, 32000),
    "llama-7b-4-layers": Shape(4096, 4, 11008, 32, 32, 32000),
    "vit-s": VisionShape(384, 12, 1536, 6, 1000),
    "tiny": Shape(32, 2, 64, 4, 2, 64),
    "tiny-vit": VisionShape(32, 2, 64, 4, 8),
}


@dataclass(frozen=True)
class Case:
    """One row of the step benchmark."""

    shape: str = "llama-8x512"
    precision: str = "bf16"
    dropout: float = 0.0
    targets: str = "all-linear"
    rank: int = 16
    batch: int = 2
    length: int = 256
    quantization: str | None = None
    layers: str = "all"
    gradient_checkpointing: bool = False
    compiled: bool = False
    kernels: str = "torch"

    def __post_init__(self) -> None:
        for field, known in (
            ("shape", SHAPES),
            ("precision", PRECISIONS),
            ("targets", TARGETS),
            ("quantization", QUANTIZATIONS),
            ("layers", LAYERS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"Case: {field}={getattr(self, field)!r} is unknown, choose of {[*known]}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products with the base weights."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def adapted_layers(self) -> list[int] | None:
        """Indices of the blocks that get adapters; None: all."""
        count = SHAPES[self.shape].layers
        return None if self.layers == "all" else list(range(count // 2, count))

    @property
    def alpha(self) -> float:
        return 2.0 * self.rank

    @property
    def linear(self) -> list[str]:
        """Names of the layers that get adapters."""
        return list(SHAPES[self.shape].linear) if self.targets == "all-linear" else TARGETS[self.targets]

    def inputs(self, *, seed: int = 0) -> dict[str, Tensor]:
        """A random batch, by the names that the model gives its arguments."""
        drawn = SHAPES[self.shape].inputs(self.batch, self.length, torch.Generator().manual_seed(seed))
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in drawn.items()}


def build_base(case: Case) -> nn.Module:
    """A randomly initialised model of the case's shape and dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SHAPES[case.shape].build().to(case.dtype)


def share(base: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers *are* those of ``base``.

    So every variant multiplies by the same tensors at the same addresses, and five variants fit in the memory
    of one.
    """
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def as_users_have_it(base: nn.Module, case: Case) -> nn.Module:
    """The base that PEFT gets: as it is, or with bitsandbytes' layers, as transformers builds them.

    Under mixed precision it has no base in bf16: one that is stored so was cast as a whole, norms and all.
    """
    if case.quantization in (None, "bf16"):
        return base
    from bitsandbytes.nn import Linear4bit

    form, model = QUANTIZATIONS[case.quantization], share(base)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        quantized = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=case.compute_dtype,
            compress_statistics=form.get("double_quant", False),
            quant_type=form["quant_type"],
        )
        quantized.weight.data = layer.weight.data
        # Else the comparison of gradients, in eval mode, would make it repack its weight, and then compute in bf16.
        quantized.support_avx512bf16_for_cpu = False
        model.set_submodule(name, quantized.to(layer.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def frozen_floor(base: nn.Module, case: Case) -> nn.Module:
    """The base alone: forward, and gradients down to the embeddings' output. No adapter can be cheaper."""
    model = share(base).requires_grad_(False)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


def with_peft(base: nn.Module, case: Case, *, cast_adapters: bool = True) -> nn.Module:
    """PEFT's model. ``cast_adapters`` is its ``autocast_adapter_dtype`` and default: fp32 adapters.

    Without it the adapters have the base's dtype: PEFT's cheapest setting over a bf16 base.
    """
    from peft import LoraConfig, get_peft_model

    model = share(base)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    config = LoraConfig(
        layers_to_transform=case.adapted_layers,
        r=case.rank,
        lora_alpha=case.alpha,
        lora_dropout=case.dropout,
        target_modules=case.linear,
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=cast_adapters)
    draw_adapters(model)
    return model.train()


def with_ours(base: nn.Module, case: Case, *, like: nn.Module | None) -> nn.Module:
    """This package's adapters, holding the values of the PEFT model ``like`` if there is one."""
    from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters
    from lightning_lora.gradient_checkpointing import enable_gradient_checkpointing

    model = share(base)
    config = LoRAConfig(
        rank=case.rank,
        alpha=case.alpha,
        dropout=case.dropout,
        target_modules=case.linear,
        layers=case.adapted_layers,
        kernels=case.kernels,
    )
    form = QUANTIZATIONS[case.quantization]
    inject_adapters(model, config, quantization=QuantizationConfig(**form) if form else None)
    if like is not None:
        copy_adapters(like, model)
    if case.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.train()


def draw_adapters(model: nn.Module, *, seed: int = 1) -> None:
    """Give every A and B of a PEFT model seeded values, so that no gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_adapters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Copy a PEFT model's A and B into a model of ours.

    Raises:
        ValueError: If the two do not adapt the same layers: then they would not compute the same.
    """
    theirs, ours = peft_adapters(source), our_adapters(target)
    if theirs.keys() != ours.keys():
        only = sorted({".".join(key) for key in theirs.keys() ^ ours.keys()})
        raise ValueError(f"copy_adapters: adapted on one side: {', '.join(only[:6])} ({len(only)} in all)")
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.copy_(theirs[key])


def peft_adapters(model: nn.Module) -> dict[tuple[str, str], nn.Parameter]:
    """A and B of a PEFT model by (layer, "lora_A" or "lora_B")."""
    return _adapters(model, _PEFT_KEY)


def our_adapters(model: nn.Module) -> dict[tuple[str, str], nn.Parameter]:
    """A and B of a model of ours by (layer, "lora_A" or "lora_B")."""
    return _adapters(model, _OUR_KEY)


def _adapters(model: nn.Module, pattern: re.Pattern[str]) -> dict[tuple[str, str], nn.Parameter]:
    found = ((pattern.match(name), parameter) for name, parameter in model.named_parameters())
    return {(match["layer"], match["factor"]): parameter for match, parameter in found if match}
