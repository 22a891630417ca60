"""A base in bf16: the numbers of an fp32 base under bf16 autocast, from half the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRAConfig,
    MergeConfig,
    QuantizationConfig,
    QuantizationError,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.layers import adapted_layers
from tests.quantization.quantized import dense, inputs, quantized

BF16 = QuantizationConfig(quant_type="bf16")


def llama(quantization: QuantizationConfig | None = None, **choice: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    inject_adapters(model, LoRAConfig(rank=4, **choice), quantization=quantization)
    torch.manual_seed(1)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.adapter("default").lora_B, std=0.1)
    return model


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "choice", [{}, {"dropout": 0.3}, {"target_modules": ("q_proj", "down_proj")}], ids=["all", "dropout", "some"]
)
def test_under_autocast_every_bit_is_that_of_an_fp32_base(choice: dict[str, Any]) -> None:
    loss, gradients = step(llama(BF16, **choice))
    expected, of_dense = step(llama(**choice))
    assert torch.equal(loss, expected)
    assert gradients.keys() == of_dense.keys()
    assert all(torch.equal(gradients[name], of_dense[name]) for name in gradients)


@pytest.mark.parametrize("targets", ["all-linear", ("0",), ("2",)])
@pytest.mark.parametrize("training", [True, False])
def test_so_it_is_with_biases_and_without_an_adapter(targets: Any, training: bool) -> None:
    outputs = []
    for quantization in (None, BF16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).train(training)
        inject_adapters(net, LoRAConfig(rank=2, target_modules=targets), quantization=quantization)
        x = inputs(64, 16)
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        outputs.append((output, *torch.autograd.grad(output.float().square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_layer_takes_half_the_bytes_and_no_copy_is_kept() -> None:
    model = llama(BF16)
    step(model)
    layers = [layer for _, layer in adapted_layers(model)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert all(layer.cast_copy is None for layer in layers)
    assert all(layer.adapter("default").lora_A.dtype == torch.float32 for layer in layers)


def test_outside_of_autocast_the_product_is_in_the_dtype_of_the_input() -> None:
    layer, x = quantized("bf16"), inputs(4, 64)
    rounded = dense().weight.to(torch.bfloat16).float()
    assert torch.equal(layer(x), nn.functional.linear(x, rounded, layer.bias))


def test_a_merge_into_the_original_weights_keeps_their_precision(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16))

    original, module = build(), build()
    save_file(original.state_dict(), tmp_path / "base.safetensors")
    inject_adapters(module, LoRAConfig(rank=2), quantization=BF16)
    nn.init.normal_(module[0].adapters["default"].lora_B, std=1e-4)
    update = module[0].weight_update()
    merge_adapters(module, MergeConfig(base="original", original=str(tmp_path / "base.safetensors")))
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, original[0].weight + update)
    unmerge_adapters(module)
    assert module[0].weight.dtype == torch.bfloat16


def test_a_weight_that_is_made_trainable_is_refused_instead_of_never_moving() -> None:
    layer = quantized("bf16")
    layer.weight.requires_grad_(True)
    with pytest.raises(QuantizationError, match="modules_to_save"):
        layer(inputs(2, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_in_bf16_is_refused(value: float) -> None:
    layer = dense()
    layer.weight.data[3, 5] = value
    with pytest.raises(QuantizationError, match="not finite"):
        quantized("bf16", layer=layer)


def test_a_dense_layer_takes_the_rounded_values_and_gives_them_back() -> None:
    stored, plain = quantized("bf16"), dense()
    plain.load_state_dict(stored.state_dict())
    assert torch.equal(plain.weight, stored.weight.float())
    other = quantized("bf16", layer=nn.Linear(64, 8))
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.weight, stored.weight)


def test_bitsandbytes_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from torch import nn\n"
        "from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters\n"
        "net = nn.Sequential(nn.Linear(4, 4))\n"
        "inject_adapters(net, LoRAConfig(rank=2), quantization=QuantizationConfig(quant_type='bf16'))\n"
        "print(net[0].weight.dtype)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "torch.bfloat16", found.stderr
