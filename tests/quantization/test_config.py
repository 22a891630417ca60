"""QuantizationConfig says what it means, refuses what means nothing, and has the form that Hydra makes of it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, QuantizationConfig, inject_adapters
from lightning_lora.quantization.config import BLOCK_SIZES, as_quantization_config
from lightning_lora.record import find_record
from tests.conftest import TinyModule
from tests.quantization.quantized import FORMATS, codes_of, quantized

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("quant_type", value) for value in ("NF4", "int4", "", None, 4, ["nf4"])],
        *[("block_size", value) for value in (0, 63, 48, 8192, -64, "64", None, True, 64.0)],
        *[("compute_dtype", value) for value in ("fp32", "bf16", torch.bfloat16, 32, "uint8")],
        *[("storage_dtype", value) for value in (None, "int8", torch.uint8, "float64")],
        *[("double_quant", value) for value in ("yes", 1, None)],
        *[("clip_search", value) for value in ("yes", 1, None)],
        *[("skip_modules", value) for value in (3, [""], [None], {"a": 1}, b"head")],
    ],
)
def test_a_value_without_meaning_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        QuantizationConfig(**{field: value})


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_double_quantization_of_what_has_no_blocks_is_refused(form: str) -> None:
    with pytest.raises(ValueError, match=rf'double_quant is for 4-bit types, not for quant_type="{form}"'):
        QuantizationConfig(quant_type=form, double_quant=True)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="blocksize"):
        QuantizationConfig(blocksize=64)  # type: ignore[call-arg]


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("form", FORMATS)
def test_bits_per_parameter_are_those_that_are_stored(form: str, block: int) -> None:
    config = QuantizationConfig(**FORMATS[form], block_size=block)
    layer = quantized(form, 512, 2048, block_size=block)
    stored = sum(tensor.numel() for tensor in codes_of(layer).values())
    scales = 512 * 4 if form == "int8" else 0
    assert config.bits_per_parameter == pytest.approx((stored - scales) * 8 / (512 * 2048), abs=1e-3)


def test_the_config_is_plain_in_files_and_comes_back() -> None:
    config = QuantizationConfig(quant_type="fp4", double_quant=True, block_size=128, skip_modules="head")
    values = json.loads(json.dumps(config.to_dict()))
    assert values["skip_modules"] == ["head"]
    assert QuantizationConfig(**values) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(QuantizationConfig(**values))


def test_hydra_gives_the_callback_a_mapping() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.create(
        {"_target_": "x", "quant_type": "nf4", "double_quant": True, "skip_modules": ["head", "re:.*lm_head"]}
    )
    expected = QuantizationConfig(double_quant=True, skip_modules=("head", "re:.*lm_head"))
    for value in (node, omegaconf.OmegaConf.to_container(node), expected):
        callback = LoRACallback(quantization=value)
        assert callback.quantization == expected
        assert type(callback.quantization.skip_modules) is tuple


@pytest.mark.parametrize("value", ["nf4", 4, True, {"quant_type": "nf5"}, [1]])
def test_what_is_no_quantization_is_refused_by_the_callback(value: Any) -> None:
    with pytest.raises(ValueError, match="quant"):
        LoRACallback(quantization=value)


def test_nothing_to_quantize_is_none() -> None:
    assert as_quantization_config(None) is None
    assert LoRACallback().quantization is None


def test_the_record_of_a_module_says_how_it_is_quantized() -> None:
    module, config = TinyModule(), QuantizationConfig(quant_type="int8")
    inject_adapters(module, LoRAConfig(rank=2), quantization=config)
    record = find_record(module)
    assert record is not None
    assert record.quantization == config


def test_without_bitsandbytes_the_message_says_what_to_install_and_nothing_is_changed() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from torch import nn\n"
        "from lightning_lora import LoRAConfig, MissingDependencyError, QuantizationConfig, inject_adapters\n"
        "net = nn.Sequential(nn.Linear(8, 8))\n"
        "try:\n"
        "    inject_adapters(net, LoRAConfig(rank=2), quantization=QuantizationConfig())\n"
        "except MissingDependencyError as error:\n"
        "    print(error, type(net[0]).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "pip install 'lightning-lora[qlora]'" in result.stdout
    assert result.stdout.strip().endswith("Linear")
