"""A plan needs no weights: a config, a folder with a config, or a name are enough."""

import json

import pytest
import torch
from transformers import LlamaConfig

from lightning_lora import LoRAConfig
from lightning_lora.app.plan import plan as plan_command
from lightning_lora.planning import plan_memory
from tests.planning.models import TINY, llama

LORA = LoRAConfig(rank=4)
OPTIONS = {
    "rank": 4,
    "target_modules": [],
    "full": False,
    "batch": 2,
    "length": 16,
    "quantization": "nf4",
    "double_quant": True,
    "gradient_checkpointing": True,
    "optimizer": "adamw8bit",
    "precision": "bf16-true",
    "gpu_gb": None,
    "as_json": False,
}


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_config_a_folder_and_the_module_give_the_same_plan(folder):
    plans = [
        plan_memory(source, LORA, batch=(2, 16))
        for source in (folder, str(folder), LlamaConfig.from_pretrained(folder), llama().to(torch.bfloat16))
    ]
    assert len({json.dumps(plan.to_dict(), sort_keys=True) for plan in plans}) == 1


def test_a_folder_without_a_config_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        plan_memory(tmp_path, LORA, batch=(1, 8))
    with pytest.raises(ValueError, match="Hugging Face hub"):
        plan_memory("nobody/no-such-model", LORA, batch=(1, 8))
    with pytest.raises(ValueError, match=r"nn\.Module"):
        plan_memory(3, LORA, batch=(1, 8))


def test_the_command_prints_the_plan_and_whether_it_fits(folder, capsys):
    assert plan_command(str(folder), **{**OPTIONS, "gpu_gb": 0.0025}) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "base weights" in printed and "fits 0.0025 GB" in printed and "largest batch" in printed
    assert plan_command(str(folder), **{**OPTIONS, "gpu_gb": 0.0001}) == 1


def test_the_command_prints_json_for_programs(folder, capsys):
    assert plan_command(str(folder), **{**OPTIONS, "as_json": True, "gpu_gb": 0.0025}) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["device"]["fits"] and values["peak"] < 10**7


@pytest.mark.parametrize("wrong", [{"quantization": None}, {"precision": "half"}, {"rank": 0}])
def test_the_command_says_what_is_wrong_in_one_line(folder, capsys, wrong):
    assert plan_command(str(folder), **{**OPTIONS, **wrong}) == 2
    assert capsys.readouterr().err.startswith("lightning-lora plan: ")
