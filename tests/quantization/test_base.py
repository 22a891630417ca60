"""Which layers of a base are stored in 4 or 8 bits, and what an injection says of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    QuantizationConfig,
    QuantizationError,
    TargetNotFoundError,
    UnsupportedSetupError,
    inject_adapters,
    merge_adapters,
    remove_adapters,
)
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import find_record
from tests.quantization.quantized import FORMATS, codes_of, equal_codes
from tests.states import same

pytest.importorskip("bitsandbytes")


WIDTH = 64


class Scaled(nn.Linear):
    """A subclass that computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that computes what its parent does; what else it does, nobody knows."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scaled, self.renamed = Scaled(WIDTH, WIDTH), Renamed(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.norm = nn.LayerNorm(WIDTH)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.tied_in, self.tied_out = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 10)
        self.tied_in.weight = self.tied_out.weight
        self.unnamed = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 10)


def stored(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, QuantizedLayer)]


def store(module: nn.Module, *, config: LoRAConfig | None = None, **options: Any) -> list[str]:
    inject_adapters(module, config or LoRAConfig(rank=2), quantization=QuantizationConfig(**options))
    return stored(module)


PLAIN = [f"blocks.{index}.{name}" for index in range(2) for name in ("up", "down")]


def test_every_plain_linear_layer_is_stored_and_nothing_else() -> None:
    module = Model()
    dense = {name: type(child) for name, child in module.named_modules()}
    assert store(module) == [*PLAIN, "unnamed"]
    for name, child in module.named_modules():
        if name in dense and name not in stored(module):
            assert all(p.is_floating_point() for p in child.parameters(recurse=False)), name


@pytest.mark.parametrize("targets", ["up", "all-linear", ["blocks.0.up", "lm_head"]])
def test_what_is_adapted_does_not_matter_for_what_is_stored(targets: Any) -> None:
    module = Model()
    assert store(module, config=LoRAConfig(rank=2, target_modules=targets, layers=None)) == [*PLAIN, "unnamed"]


def test_a_subset_of_blocks_to_adapt_and_rank_patterns_leave_the_storage_alone() -> None:
    module = Model()
    config = LoRAConfig(rank=2, target_modules="up", layers=[1], rank_pattern={"up": 4}, exclude_modules="embed")
    assert store(module, config=config) == [*PLAIN, "unnamed"]


def test_modules_that_are_trained_in_full_stay_dense() -> None:
    module = Model()
    config = LoRAConfig(rank=2, target_modules="up", modules_to_save=["blocks.0.down", "unnamed"])
    assert store(module, config=config) == [name for name in PLAIN if name != "blocks.0.down"]
    assert module.unnamed.weight.requires_grad


def test_skipped_modules_stay_dense_with_all_that_is_inside() -> None:
    assert store(Model(), skip_modules=("blocks.0", "unnamed")) == ["blocks.1.up", "blocks.1.down"]
    assert store(Model(), skip_modules="down") == ["blocks.0.up", "blocks.1.up", "unnamed"]


def test_a_pattern_that_matches_nothing_is_an_error_and_nothing_changes() -> None:
    module = Model()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TargetNotFoundError, match=r"skip_modules: 'dwon' matches no module\. Closest: .*down"):
        store(module, skip_modules="dwon")
    assert same(module.state_dict(), before)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert stored(module) == []


def test_a_module_with_nothing_to_store_is_an_error_that_says_why() -> None:
    module = nn.Sequential(Scaled(WIDTH, WIDTH), nn.ReLU(), Scaled(WIDTH, WIDTH))
    with pytest.raises(QuantizationError, match="No linear layer of Sequential can be stored as nf4: '0': Scaled"):
        store(module)
    with pytest.raises(QuantizationError, match="excluded by"):
        store(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), skip_modules="0")


def test_a_broken_weight_is_an_error_by_name_and_nothing_changes() -> None:
    module = Model()
    module.blocks[1].down.weight.data[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"'blocks\.1\.down' can't be quantized"):
        store(module)
    assert stored(module) == []
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert store(module, skip_modules="blocks.1.down") == [*PLAIN[:3], "unnamed"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_report_counts_dense_numbers_and_says_what_is_stored_how(form: str) -> None:
    module = Model()
    count = sum(p.numel() for p in module.parameters())
    report = inject_adapters(
        module, LoRAConfig(rank=2, target_modules="up"), quantization=QuantizationConfig(**FORMATS[form])
    )
    assert report.total_parameters == count + report.trainable_parameters
    assert report.trainable_parameters == 2 * 2 * 3 * WIDTH
    first = report.layers[0]
    assert (first.name, first.shape, first.total - first.trainable) == ("blocks.0.up", (2 * WIDTH, WIDTH), 8320)
    shown = "int8" if form == "int8" else form.replace("-double", " (double)")
    dense = 4 * (4 * 2 * WIDTH * WIDTH + WIDTH * WIDTH) / 1e6
    (note,) = [note for note in report.notes if "stored as" in note]
    assert note.startswith(f"5 linear layers stored as {shown}: ")
    assert note.endswith(f"instead of {dense:,.1f} MB")


def test_a_second_adapter_leaves_the_storage_as_it_is() -> None:
    module = Model()
    store(module)
    codes = codes_of(module)
    inject_adapters(module, LoRAConfig(rank=4), name="second")
    inject_adapters(module, LoRAConfig(rank=4), name="third", quantization=QuantizationConfig())
    assert same(codes_of(module), codes)
    record = find_record(module)
    assert record is not None
    assert record.quantization == QuantizationConfig()


def test_another_format_of_a_stored_base_is_refused() -> None:
    module = Model()
    store(module)
    with pytest.raises(ValueError, match="quantized already, with QuantizationConfig"):
        inject_adapters(module, LoRAConfig(rank=2), name="second", quantization=QuantizationConfig(quant_type="fp4"))
    remove_adapters(module)
    with pytest.raises(ValueError, match="quantized already, with QuantizationConfig"):
        store(module, quant_type="fp4")
    with pytest.raises(ValueError, match="quantized already"):
        store(copy.deepcopy(module), skip_modules="up")
    assert store(module) == [*PLAIN, "unnamed"]


def test_storing_a_base_that_has_adapters_is_refused() -> None:
    module = Model()
    inject_adapters(module, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="have adapters already"):
        inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig())
    assert stored(module) == []


def test_two_modules_with_the_same_weights_are_stored_the_same_wherever_random_streams_are() -> None:
    module = Model()
    twin = copy.deepcopy(module)
    store(module)
    torch.rand(7)
    state = torch.get_rng_state()
    store(twin)
    assert equal_codes(module, twin)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("adapted", [True, False])
def test_an_encoder_of_torch_gives_in_evaluation_what_it_gives_in_training(form: str, adapted: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    module = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})
    module["other"] = nn.Linear(WIDTH, WIDTH)
    config = LoRAConfig(rank=2, target_modules="linear1" if adapted else "other")
    names = store(module, config=config, **FORMATS[form])
    assert names[:2] == ["encoder.layers.0.linear1", "encoder.layers.0.linear2"]
    assert not [name for name in names if "out_proj" in name]
    x = torch.randn(2, 5, WIDTH)
    expected = module["encoder"].train()(x)
    with torch.no_grad():
        torch.testing.assert_close(module["encoder"].eval()(x), expected)


def test_t5_keeps_the_layer_that_it_casts_inputs_to() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=32, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    names = store(nn.ModuleDict({"model": model}))
    assert names
    assert not [name for name in names if name.endswith(".wo") or "lm_head" in name]
    ids = torch.arange(6)[None]
    assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids).logits).all()
    skipped = inject_adapters(copy.deepcopy(model), LoRAConfig(rank=2)).skipped
    assert "lm_head" in skipped


def test_parts_of_names_that_transformers_keeps_wide_are_understood_with_dots() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64))
    model._keep_in_fp32_modules = {"mlp.gate_proj", "self_attn.q_proj.weight"}  # as others have "indexer.weights_proj"
    names = store(model)
    assert [name.rpartition(".")[2] for name in names] == ["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def test_a_head_that_from_pretrained_initialised_anew_stays_dense(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, vocab_size=64, max_position_embeddings=16)
    transformers.BertModel(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    names = store(model)
    assert len(names) == 7  # six of the block, and the pooler
    assert not [name for name in names if "classifier" in name]
    assert model.classifier.weight.requires_grad


def test_training_a_layer_in_full_that_is_stored_as_codes_is_refused() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig())
    with pytest.raises(UnsupportedSetupError, match=r"'1' is stored as nf4 and can't be trained in full"):
        inject_adapters(module, LoRAConfig(rank=2, modules_to_save=("1",)), name="second")


def test_8_bit_codes_that_were_written_over_in_place_are_refused() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig(quant_type="int8"))
    module[1].weight.data.copy_(torch.randn(64, 64))  # as a setup() does that loads pretrained weights by hand
    with pytest.raises(QuantizationError, match=r"'1' were written over in place"):
        inject_adapters(module, LoRAConfig(rank=2), quantization=QuantizationConfig(quant_type="int8"))


def test_weights_train_again_after_a_merge_of_a_second_injection() -> None:
    """The first one noted which weights required gradients, and its note was dropped with its adapters."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))
    net[2].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    config = LoRAConfig(rank=2, exclude_modules=("3",))
    inject_adapters(net, config, quantization=QuantizationConfig())
    remove_adapters(net)
    inject_adapters(net, config)
    merge_adapters(net)
    remove_adapters(net)
    assert not any(isinstance(child, QuantizedLayer) for child in net)
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == before
