"""A plan needs no weights: a config, a folder with a config, or a name are enough."""

import json

import pytest
import torch
from transformers import LlamaConfig

from lightning_lora import LoRAConfig
from lightning_lora.planning import plan_memory
from tests.planning.models import TINY, llama

LORA = LoRAConfig(rank=4)


@pytest.fixture
def folder(tmp_path):
    shape = {**TINY, "num_hidden_layers": 1, "attention_dropout": 0.1}
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_config_a_folder_and_the_loaded_module_give_the_same_plan(folder):
    loaded = (
        llama(num_hidden_layers=1, attention_dropout=0.1).to(torch.bfloat16).eval()
    )  # as from_pretrained returns it
    plans = [
        plan_memory(source, LORA, batch=(2, 16))
        for source in (folder, str(folder), LlamaConfig.from_pretrained(folder), loaded)
    ]
    assert len({json.dumps(plan.to_dict(), sort_keys=True) for plan in plans}) == 1


def test_a_folder_without_a_config_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        plan_memory(tmp_path, LORA, batch=(1, 8))
    with pytest.raises(ValueError, match="Hugging Face hub"):
        plan_memory("nobody/no-such-model", LORA, batch=(1, 8))
    with pytest.raises(ValueError, match=r"nn\.Module"):
        plan_memory(3, LORA, batch=(1, 8))
