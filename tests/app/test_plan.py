"""The plan command, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from lightning_lora.app.commands import build_app

SIZE = ["--rank", "4", "--batch", "2", "--length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder without weights."""
    place: Path = tmp_path_factory.mktemp("llama")
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=256
    )
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(place)
    return str(place)


def test_it_prints_a_table_for_a_folder_without_weights(folder: str) -> None:
    result = CliRunner().invoke(build_app(), ["plan", folder, *SIZE])
    assert result.exit_code == 0, result.output
    assert "peak" in result.output and "base weights" in result.output


def test_json_holds_the_peak_and_whether_it_fits(folder: str) -> None:
    call = ["plan", folder, *SIZE, "--quantization", "nf4", "--double-quant", "--gradient-checkpointing"]
    call += ["--optimizer", "paged_adamw8bit", "--gpu-gb", "0.0025", "--json"]
    result = CliRunner().invoke(build_app(), call)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 0 < found["peak"] < 0.0025e9
    assert found["settings"]["optimizer"] == "AdamW (8-bit, paged)"
    assert found["device"]["fits"] is True


def test_what_does_not_fit_is_said_and_ends_with_status_1(folder: str) -> None:
    result = CliRunner().invoke(build_app(), ["plan", folder, *SIZE, "--gpu-gb", "0.0001"])
    assert result.exit_code == 1
    assert "does not fit 0.0001 GB" in " ".join(result.output.split()) and "largest batch 0" in result.output


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--quantization", "nf5"], "quant_type must be one of"),
        (["--double-quant"], "--double-quant needs --quantization"),
        (["--precision", "half"], "precision must be one of"),
        (["--rank", "0"], "rank"),
        (["--optimizer", "adam"], "paged_adamw8bit"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_a_sentence(folder: str, wrong: list[str], message: str) -> None:
    result = CliRunner().invoke(build_app(), ["plan", folder, *wrong])
    assert result.exit_code == 2
    assert result.stderr.startswith("lightning-lora plan: ") and message in result.stderr
