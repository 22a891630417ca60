"""Layers that bitsandbytes or transformers quantized: adapted as they are, given back as they were."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    QuantizationConfig,
    QuantizationError,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora.layers import adapted_layers
from lightning_lora.quantization.conversion import foreign_kind
from lightning_lora.quantized_layer import QuantizedLayer
from tests.quantization.quantized import codes_of, dense, inputs
from tests.states import same

bnb = pytest.importorskip("bitsandbytes")
Linear4bit, Linear8bitLt, LinearFP4, LinearNF4 = (
    getattr(bnb.nn, name) for name in ("Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4")
)

OUT = 32  # the kernel that bitsandbytes repacks weights for takes multiples of 32 only
packs = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks weights on CPUs with AVX512-BF16 only"
)
MADE: dict[str, Any] = {
    "Linear4bit": lambda: Linear4bit(64, OUT, quant_type="nf4", compute_dtype=torch.float32),
    "Linear4bit without a compute dtype": lambda: Linear4bit(64, OUT, quant_type="fp4", compress_statistics=False),
    "LinearNF4": lambda: LinearNF4(64, OUT, compute_dtype=torch.float32),
    "LinearFP4": lambda: LinearFP4(64, OUT, compute_dtype=torch.float32),
    "Linear8bitLt": lambda: Linear8bitLt(64, OUT, has_fp16_weights=False),
    "Linear8bitLt with a threshold": lambda: Linear8bitLt(64, OUT, has_fp16_weights=False, threshold=6.0),
}
# 8-bit layers of bitsandbytes round their inputs to 8 bits, too, where there is a kernel for that: not in training on a
# CPU, but fp16 scales are rounded. Ours compute with the dequantized weight.
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def made(kind: str) -> nn.Sequential:
    layer = MADE[kind]()
    layer.load_state_dict(dense(OUT).state_dict())
    return nn.Sequential(layer.to("cpu"))


@packs
def test_the_trap_is_there_in_bitsandbytes_own_layer() -> None:
    layer, x = made("Linear4bit")[0], inputs(6, 64, grad=False)
    before = layer.weight.data.clone()
    layer.eval()(x)
    assert not torch.equal(layer.weight.data.view(-1), before.view(-1)), "an evaluation repacks the codes"
    y = x.clone().requires_grad_()
    lost = None
    try:
        layer.train()(y).sum().backward()
        lost = y.grad
    except RuntimeError as error:
        assert "view of a leaf Variable" in str(error)  # noqa: PT017
    assert lost is None, "and nothing can be trained after it"


@packs
@pytest.mark.parametrize("kind", [kind for kind in MADE if "4" in kind])
def test_an_adopted_layer_is_free_of_the_trap_and_still_is_when_it_is_given_back(kind: str) -> None:
    holder, x = made(kind), inputs(6, 64, grad=False)
    inject_adapters(holder, LoRAConfig(rank=2))
    codes = codes_of(holder)
    before = holder(x)
    assert torch.equal(holder.eval()(x), before)
    assert same(codes_of(holder), codes)
    y = x.clone().requires_grad_()
    holder.train()(y).square().sum().backward()
    assert y.grad is not None
    assert holder[0].adapters["default"].lora_B.grad.abs().sum() > 0
    remove_adapters(holder)
    stored = holder[0].weight.data.clone()
    holder.eval()(x)
    assert torch.equal(holder[0].weight.data, stored)


@packs
@pytest.mark.parametrize("kind", [kind for kind in MADE if "4" in kind])
@pytest.mark.parametrize("saved", [False, True], ids=["packed", "unpacked by a save"])
def test_a_layer_that_was_repacked_is_refused_by_name_and_the_others_stay(kind: str, saved: bool) -> None:
    holder = nn.Sequential(made(kind)[0], nn.Tanh(), made(kind)[0])
    holder[2].eval()(inputs(6, OUT * 2, grad=False))
    if saved:  # bitsandbytes unpacks then, but not the scales
        holder.state_dict()
    types = [type(child) for child in holder]
    with pytest.raises(QuantizationError, match=r"'2' was evaluated before.*support_avx512bf16_for_cpu"):
        inject_adapters(holder, LoRAConfig(rank=2))
    assert [type(child) for child in holder] == types
    assert not [key for key in vars(holder[0]) if "lightning_lora" in key]
    assert holder[0](inputs(6, 64)).shape == (6, OUT)


@pytest.mark.parametrize("kind", MADE)
def test_outputs_are_as_before_and_class_and_attributes_come_back(kind: str) -> None:
    holder, x = made(kind), inputs(6, 64)
    own, attributes = type(holder[0]), {*vars(holder[0])}
    before = holder.train()(x)
    weight, bias = holder[0].weight.data.clone(), holder[0].bias.detach().clone()
    report = inject_adapters(holder, LoRAConfig(rank=2))
    torch.testing.assert_close(holder(x), before, **({} if "4" in kind else CLOSE))
    assert isinstance(holder[0], QuantizedLayer)
    assert report.layers[0].shape == (OUT, 64)
    assert report.total_parameters == OUT * 64 + OUT + report.trainable_parameters
    nn.init.ones_(holder[0].adapters["default"].lora_B)
    remove_adapters(holder)
    assert type(holder[0]) is own
    assert {*vars(holder[0])} == attributes
    torch.testing.assert_close(holder(x), before)
    assert torch.equal(holder[0].weight.data, weight)
    assert torch.equal(holder[0].bias, bias)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_copies_made_before_or_after_the_injection_are_whole(kind: str, copied: Any, moment: str) -> None:
    holder, x = made(kind), inputs(6, 64)
    if moment == "before":
        holder = copied(holder)
    inject_adapters(holder, LoRAConfig(rank=2))
    expected = holder(x)
    twin = copied(holder) if moment == "after" else copy.deepcopy(holder)
    assert torch.equal(twin(x), expected)
    for module in (holder, twin):
        remove_adapters(module)
        assert foreign_kind(module[0]) is not None
        torch.testing.assert_close(module(x), expected, **CLOSE)


def test_layers_that_are_not_quantized_yet_are_as_they_are_adopted() -> None:
    layer = LinearNF4(64, OUT, compute_dtype=torch.float32)
    layer.load_state_dict(dense(OUT).state_dict())
    holder = nn.Sequential(layer)
    inject_adapters(holder, LoRAConfig(rank=2))
    assert same(codes_of(holder), {**codes_of(nn.Sequential(_adapted("LinearNF4")))})


def _adapted(kind: str) -> nn.Module:
    holder = made(kind)
    inject_adapters(holder, LoRAConfig(rank=2))
    return holder[0]


class Scaled(LinearNF4):
    """A subclass that computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_with_its_own_forward_is_refused_and_not_replaced() -> None:
    holder = nn.Sequential(Scaled(64, OUT, compute_dtype=torch.float32).to("cpu"))
    before = holder(inputs(2, 64))
    with pytest.raises(QuantizationError, match="'0' is a Linear4bit of bitsandbytes with a forward of its own"):
        inject_adapters(holder, LoRAConfig(rank=2))
    assert type(holder[0]) is Scaled
    assert torch.equal(holder(inputs(2, 64)), before)


def test_a_layer_under_a_hook_of_accelerate_is_refused_with_advice() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    holder = made("LinearNF4")
    hooks.add_hook_to_module(holder[0], hooks.AlignDevicesHook("cpu"))
    with pytest.raises(QuantizationError, match="remove_hook_from_module"):
        inject_adapters(holder, LoRAConfig(rank=2))
    hooks.remove_hook_from_module(holder, recurse=True)
    inject_adapters(holder, LoRAConfig(rank=2))
    assert [name for name, _ in adapted_layers(holder)] == ["0"]


def test_8_bit_layers_that_train_their_weights_are_no_quantized_ones() -> None:
    assert foreign_kind(Linear8bitLt(64, OUT, has_fp16_weights=True)) is None


def test_dense_layers_beside_foreign_ones_are_quantized_as_asked() -> None:
    holder = nn.Sequential(made("LinearNF4")[0], dense(8, OUT))
    inject_adapters(holder, LoRAConfig(rank=2), quantization=QuantizationConfig(quant_type="int8"))
    assert [child.describe() for child in holder] == ["nf4 (double)", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64)
        transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
WAYS: dict[str, dict[str, Any]] = {
    "4bit": {**FOUR, "bnb_4bit_compute_dtype": torch.float32},
    "4bit in bf16": {**FOUR, "bnb_4bit_compute_dtype": torch.bfloat16},
    "8bit": {"load_in_8bit": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_transformers_quantized_trains_after_an_evaluation(way: str, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**WAYS[way])
    ).train()
    layer, ids = model.model.layers[0].mlp.down_proj, torch.arange(8)[None]
    own, before = type(layer), model(ids).logits
    report = inject_adapters(model, LoRAConfig(rank=2))
    assert len(report.layers) == 7
    codes = codes_of(model)
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)
    assert torch.equal(model.eval()(ids).logits, model.train()(ids).logits)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if name.endswith("lora_B")]
    assert len(grads) == 7
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert same(codes_of(model), codes)
    remove_adapters(model)
    assert type(layer) is own
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)


@pytest.mark.parametrize("way", ["4bit", "8bit"])
def test_a_merged_model_that_transformers_quantized_is_dense_and_can_be_saved_and_opened(
    way: str, folder: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**WAYS[way])
    )
    inject_adapters(model, LoRAConfig(rank=2))
    ids = torch.arange(8)[None]
    live = model(ids).logits
    merge_adapters(model)
    torch.testing.assert_close(model(ids).logits, live, **CLOSE)
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(ids).logits, live, **CLOSE)
    unmerge_adapters(model)
    assert model.config.quantization_config is not None
    assert torch.equal(model(ids).logits, live)
