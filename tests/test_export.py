"""The merged artifact: vanilla keys, whole or not at all, and never in the place of another one."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from lightning_lora import LoRAConfig, MergeConfig, MergeError, inject_adapters, merge_adapters
from lightning_lora.adapter import Adapter
from lightning_lora.export import merged_state_dict, unused_folder, write_folder, write_merged, write_report
from lightning_lora.layers import AdaptedLayer
from tests.conftest import TinyModule
from tests.targets.architectures import build

TOKENS = torch.tensor([[1, 5, 3, 2]])


def adapt(module: nn.Module, **options: Any) -> None:
    inject_adapters(module, LoRAConfig(**{"rank": 2, **options}))
    for child in module.modules():
        if isinstance(child, Adapter):
            nn.init.normal_(child.get_parameter("lora_B"), std=0.1, generator=torch.Generator().manual_seed(0))


def bare(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": state, "pytorch-lightning_version": pl.__version__}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keys_are_vanilla_and_values_those_of_an_in_place_merge() -> None:
    module, plain = TinyModule(), TinyModule()
    adapt(module, modules_to_save=["head"])
    state = merged_state_dict(module, MergeConfig())
    assert list(state) == list(plain.state_dict())
    merge_adapters(module)
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_floating_point_entries_are_cast_from_the_exact_sum(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapt(module)
    exact, state = (
        merged_state_dict(module, MergeConfig()),
        merged_state_dict(module, MergeConfig(dtype=str(dtype).removeprefix("torch."))),
    )
    assert {key: value.dtype for key, value in state.items() if key != "1.num_batches_tracked"} == {
        key: dtype for key in exact if key != "1.num_batches_tracked"
    }
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(state["0.weight"], exact["0.weight"].to(dtype))


def test_a_shared_layer_is_merged_under_all_of_its_names() -> None:
    shared = nn.Linear(4, 4)
    module = nn.ModuleDict({"one": shared, "two": shared})
    adapt(module)
    state = merged_state_dict(module, MergeConfig())
    assert set(state) == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert torch.equal(state["one.weight"], state["two.weight"])
    assert not torch.equal(state["one.weight"], shared.weight)


def test_the_live_module_keeps_its_adapters(tmp_path: Path) -> None:
    module = TinyModule()
    adapt(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_the_file_opens_with_weights_only_and_loads_into_the_original_class(tmp_path: Path) -> None:
    module = TinyModule()
    adapt(module)
    folder = write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    assert names(folder) == ["merged.ckpt"]
    loaded = TinyModule.load_from_checkpoint(folder / "merged.ckpt")
    x = torch.randn(3, 16)
    torch.testing.assert_close(loaded(x), module(x))


class WithModel(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"model": build(name)})


def output(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        result = model(TOKENS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_transformers_model_inside_becomes_a_folder_that_opens_without_us(name: str, tmp_path: Path) -> None:
    module = WithModel(name)
    adapt(module)
    folder = write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    assert names(folder) == ["merged.ckpt", "net.model"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "net.model")
    torch.testing.assert_close(output(loaded), output(module.net["model"]), rtol=1e-4, atol=1e-4)
    assert not any("lora" in key for key in loaded.state_dict())
    tied = module.net["model"].config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_the_folder_is_called_model_when_the_root_is_one(tmp_path: Path) -> None:
    model = build("bert").bert
    adapt(model)
    folder = write_merged(model, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    assert names(folder) == ["merged.ckpt", "model"]
    torch.testing.assert_close(output(AutoModel.from_pretrained(folder / "model")), output(model), rtol=1e-4, atol=1e-4)


def test_the_dtype_asked_for_is_noted_and_opened(tmp_path: Path) -> None:
    module = WithModel("llama")
    adapt(module)
    folder = write_merged(module, tmp_path / "merged", MergeConfig(dtype="bfloat16"), make_checkpoint=bare)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "net.model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_what_is_there_already_is_never_touched(tmp_path: Path) -> None:
    module = TinyModule()
    adapt(module)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    folders = [write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare) for _ in range(2)]
    assert [folder.name for folder in folders] == ["merged-v1", "merged-v2"]
    assert names(tmp_path) == ["merged", "merged-v1", "merged-v2"]
    assert names(tmp_path / "merged") == ["mine.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        assert not (tmp_path / "new").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", fill)
    assert names(tmp_path) == []


def test_missing_parents_are_made_and_the_folder_has_usual_permissions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a" / "b", lambda folder: None)
    assert folder == tmp_path / "a" / "b"
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_name_taken_in_between_is_left_to_the_other(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("ours")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("theirs")

    assert write_folder(tmp_path / "new", fill).name == "new-v1"
    assert (tmp_path / "new" / "file").read_text() == "theirs"


def test_a_place_that_cannot_be_written_is_an_error_of_ours_and_nothing_is_left(tmp_path: Path) -> None:
    module = TinyModule()
    adapt(module)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MergeError, match=r"can't be written to .*The adapters are untouched"):
        write_merged(module, tmp_path / "file" / "merged", MergeConfig(), make_checkpoint=bare)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("make_checkpoint", [bare, lambda state: {}], ids=["merged.ckpt", "model.safetensors"])
def test_a_full_disk_is_an_error_of_ours_and_nothing_is_left(make_checkpoint: Any, tmp_path: Path) -> None:
    module = WithModel("llama")
    adapt(module)
    with files_of_at_most(10_000), pytest.raises(MergeError, match=r"can't be written to .*The adapters are untouched"):
        write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=make_checkpoint)
    assert names(tmp_path) == []
    assert isinstance(module.net["model"].model.layers[0].mlp.up_proj, AdaptedLayer)


def test_the_report_lies_beside_the_weights(tmp_path: Path) -> None:
    module = TinyModule()
    adapt(module)
    folder = write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    report = merge_adapters(module)
    write_report(report, folder)
    assert names(folder) == ["merge_report.json", "merged.ckpt"]
    assert json.loads((folder / "merge_report.json").read_text())["relative_error"] == report.relative_error


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    module = TinyModule()
    adapt(module)
    with torch.no_grad():
        module.backbone[0].adapters["default"].lora_B.fill_(float("nan"))
    with pytest.raises(MergeError, match="not finite"):
        write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    assert names(tmp_path) == []


def test_weights_that_a_state_dict_hook_renames_are_refused_not_written_unmerged(tmp_path: Path) -> None:
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in [key for key in state if key.startswith("backbone.")]:
            state[key.replace("backbone.", "encoder.")] = state.pop(key)

    module = TinyModule()
    module._register_state_dict_hook(rename)
    adapt(module)
    with pytest.raises(MergeError, match=r"not in the module's state dict, such as 'backbone\.0\.adapters"):
        write_merged(module, tmp_path / "merged", MergeConfig(), make_checkpoint=bare)
    assert names(tmp_path) == []


def test_an_unused_folder_is_never_one_that_exists(tmp_path: Any) -> None:
    assert unused_folder(tmp_path / "merged") == tmp_path / "merged"
    (tmp_path / "merged").mkdir()
    assert unused_folder(tmp_path / "merged") == tmp_path / "merged-v1"
    (tmp_path / "merged-v1").write_text("a file is in the way, too")
    assert unused_folder(tmp_path / "merged") == tmp_path / "merged-v2"
