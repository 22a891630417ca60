"""What a merge of a base in 4 or 8 bits adds the update to: and that each choice is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    MergeConfig,
    MergeError,
    QuantizationConfig,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora.export import merged_state_dict
from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.record import find_record

FORMATS: list[Any] = [
    pytest.param({"quant_type": "nf4"}, id="nf4"),
    pytest.param({"quant_type": "nf4", "double_quant": True}, id="nf4-double"),
    pytest.param({"quant_type": "fp4"}, id="fp4"),
    pytest.param({"quant_type": "int8"}, id="int8"),
    pytest.param({"quant_type": "bf16"}, id="bf16"),
]


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 64))


def trained(form: dict[str, Any], **choice: Any) -> nn.Sequential:
    """A quantized module whose adapters moved by about 2 % of the weight."""
    module = dense()
    inject_adapters(module, LoRAConfig(rank=4, **choice), quantization=QuantizationConfig(**form))
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.002)
    return module


def file_of(module: nn.Module, path: Path) -> str:
    save_file({f"model.{key}": value.contiguous() for key, value in module.state_dict().items()}, path)
    return str(path)


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(torch.randn(8, 64, generator=torch.Generator().manual_seed(2)))


def relative(a: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


@pytest.mark.parametrize("form", FORMATS)
def test_by_default_the_merged_module_is_dense_and_computes_what_the_live_one_did(form: dict[str, Any]) -> None:
    module = trained(form)
    live = outputs(module)
    report = merge_adapters(module)
    assert report.base == "dequantized"
    assert report.relative_error < 1e-5
    assert all(type(child) in (nn.Linear, nn.GELU) for child in module)
    assert relative(outputs(module), live) < 1e-5


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("base", ["dequantized", "original", "requantized"])
def test_unmerging_gives_every_bit_back(form: dict[str, Any], base: str, tmp_path: Path) -> None:
    module = trained(form)
    live, state = outputs(module), {key: value.clone() for key, value in module.state_dict().items()}
    source = file_of(dense(), tmp_path / "base.safetensors") if base == "original" else None
    merge_adapters(module, MergeConfig(base=base, original=source, tolerance=9.0))
    assert not torch.equal(outputs(module), live)
    unmerge_adapters(module)
    assert torch.equal(outputs(module), live)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_original_weights_get_the_update_and_nothing_of_the_quantization(tmp_path: Path) -> None:
    module = trained({"quant_type": "nf4"})
    update = module[0].weight_update()
    source = file_of(dense(), tmp_path / "base.safetensors")
    report = merge_adapters(module, MergeConfig(base="original", original=source))
    assert torch.allclose(module[0].weight, dense()[0].weight + update, atol=1e-7)
    assert torch.equal(module[0].bias, dense()[0].bias)
    assert report.relative_error < 1e-5
    assert all(layer.shift > 1 for layer in report.layers)  # the quantization changed more than the adapters did


def test_the_weights_of_another_model_are_refused_as_original_ones(tmp_path: Path) -> None:
    module = trained({"quant_type": "nf4"})
    live = outputs(module)
    source = file_of(dense(seed=5), tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match=r"is not what .* was quantized from"):
        merge_adapters(module, MergeConfig(base="original", original=source))
    assert torch.equal(outputs(module), live)


def test_original_weights_that_nothing_names_are_refused() -> None:
    with pytest.raises(MergeError, match="needs the files of the base"):
        merge_adapters(trained({"quant_type": "nf4"}), MergeConfig(base="original"))


def test_a_file_without_the_weights_is_refused(tmp_path: Path) -> None:
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    with pytest.raises(MergeError, match="is not in"):
        merge_adapters(
            trained({"quant_type": "nf4"}),
            MergeConfig(base="original", original=str(tmp_path / "base.safetensors")),
        )


@pytest.mark.parametrize("form", FORMATS[:3])
def test_quantizing_again_loses_a_small_update_and_is_refused_unless_asked_for(form: dict[str, Any]) -> None:
    module = trained(form)
    live = outputs(module)
    with pytest.raises(MergeError, match=r'would lose .*base="dequantized"'):
        merge_adapters(module, MergeConfig(base="requantized"))
    assert torch.equal(outputs(module), live)
    report = merge_adapters(module, MergeConfig(base="requantized", tolerance=9.0))
    assert report.relative_error > 0.5
    assert all(isinstance(module[index], QuantizedLayer) for index in (0, 2, 4))


@pytest.mark.parametrize("base", ["dequantized", "requantized"])
def test_the_artifact_is_the_merged_module(base: str) -> None:
    config = MergeConfig(base=base, tolerance=9.0)
    module = trained({"quant_type": "nf4"})
    artifact = merged_state_dict(module, config)
    assert {key: value.shape for key, value in artifact.items()} == {
        k: v.shape for k, v in dense().state_dict().items()
    }
    merge_adapters(module, config)
    plain = dense()
    plain.load_state_dict(artifact)
    assert relative(outputs(plain), outputs(module)) < 1e-6


@pytest.mark.parametrize("name", ["0", "4"])
def test_quantized_layers_without_adapters_are_dense_in_the_artifact_and_after_the_merge(name: str) -> None:
    module = trained({"quant_type": "nf4"}, target_modules=[name])
    live = outputs(module)
    plain = dense()
    plain.load_state_dict(merged_state_dict(module, MergeConfig()))
    assert relative(outputs(plain), live) < 1e-5
    merge_adapters(module)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert relative(outputs(module), live) < 1e-5
    unmerge_adapters(module)
    assert torch.equal(outputs(module), live)


def test_a_base_of_another_name_is_refused_when_the_config_is_made() -> None:
    with pytest.raises(ValueError, match="base must be one of dequantized, original, requantized"):
        MergeConfig(base="best")
    with pytest.raises(ValueError, match="original is a path"):
        MergeConfig(original="somewhere")


def test_a_merged_module_that_was_cast_merges_again_after_the_unmerge() -> None:
    module = trained({"quant_type": "nf4"})
    merge_adapters(module)
    module.to(torch.bfloat16)
    unmerge_adapters(module)
    assert module[0].weight_dtype == torch.bfloat16
    merge_adapters(module)
    assert module[0].weight.dtype == module[0].bias.dtype == torch.bfloat16


def test_a_format_is_noted_again_when_adapters_were_removed_and_injected_anew() -> None:
    module = trained({"quant_type": "nf4"})
    remove_adapters(module)
    inject_adapters(module, LoRAConfig(rank=2))
    record = find_record(module)
    assert record is not None
    assert record.quantization == QuantizationConfig()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
def test_a_partly_adapted_merged_module_that_was_cast_can_be_unmerged(dtype: torch.dtype) -> None:
    module = dense().to(dtype)
    inject_adapters(module, LoRAConfig(rank=2, target_modules=["0"]), quantization=QuantizationConfig())
    nn.init.normal_(module[0].adapters["default"].lora_B, std=0.02)
    codes = module[0].weight.clone()
    merge_adapters(module)
    module.to(torch.float16)
    unmerge_adapters(module)
    assert torch.equal(module[0].weight, codes)


def test_after_a_merge_no_layer_of_a_pretrained_model_is_taken_for_newly_initialised() -> None:
    module = trained({"quant_type": "nf4"})
    merge_adapters(module)
    assert all(getattr(module[index].weight, "_is_hf_initialized", False) for index in (0, 2, 4))


def test_the_original_is_where_the_base_was_streamed_from(tmp_path: Path) -> None:
    callback = LoRACallback(base_weights=tmp_path / "base", merge_on_fit_end=MergeConfig(base="original"))
    assert callback.merge_config == MergeConfig(base="original", original=str(tmp_path / "base"))


def test_original_weights_that_are_wrong_for_a_layer_without_adapters_leave_everything_as_it_was(
    tmp_path: Path,
) -> None:
    module = trained({"quant_type": "nf4"}, target_modules=["0"])
    live, mixed = outputs(module), dense()
    mixed[4].load_state_dict(dense(seed=5)[4].state_dict())
    source = file_of(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(MergeError, match="'4' was quantized from"):
        merge_adapters(module, MergeConfig(base="original", original=source))
    assert torch.equal(outputs(module), live)
    assert isinstance(module[0], QuantizedLayer)
