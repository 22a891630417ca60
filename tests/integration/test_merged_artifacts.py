"""Merged artifacts open with the original classes in a process in which lightning_lora can't be imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_lora import LoRACallback, MergeConfig
from tests.integration.language import Language, token_loader
from tests.integration.lives import LIGHTNINGS_ADVICE, best_and_last, lora, quiet_trainer
from tests.integration.networks import Eager, loader
from tests.integration.process import in_new_process
from tests.integration.vanilla import open_artifacts, outputs
from tests.states import same

pytest.importorskip("transformers")
pytestmark = LIGHTNINGS_ADVICE
LANGUAGES = ("llama", "llama-tied", "gpt2", "bert")


@dataclass
class Merged:
    """A run that merged, and what the module gave just before."""

    module: pl.LightningModule
    callback: LoRACallback
    folder: Path
    adapted_outputs: Tensor


class OutputsBeforeTheMerge(pl.Callback):
    outputs: Tensor

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.outputs = outputs(pl_module)
        pl_module.train()


def merge(module: pl.LightningModule, data: Any, folder: Path) -> Merged:
    callback, before = lora(merge_on_fit_end=MergeConfig(output_dir=str(folder / "artifact"))), OutputsBeforeTheMerge()
    trainer = quiet_trainer(folder, callback, before, best_and_last(folder), epochs=2)
    trainer.fit(module, data, data)
    return Merged(module, callback, folder / "artifact", before.outputs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Merged]:
    languages = {kind: merge(Language(kind), token_loader(), tmp_path_factory.mktemp(kind)) for kind in LANGUAGES}
    return {"regression": merge(Eager(), loader(), tmp_path_factory.mktemp("regression")), **languages}


@pytest.fixture(scope="module")
def opened(runs: dict[str, Merged]) -> dict[str, dict[str, Any]]:
    """Everything that a process without lightning_lora finds in the artifacts."""
    folders = {kind: str(run.folder) for kind, run in runs.items()}
    result: dict[str, dict[str, Any]] = in_new_process(open_artifacts, folders, without=("lightning_lora",))
    return result


@pytest.mark.parametrize("kind", ["regression", *LANGUAGES])
def test_the_original_class_opens_the_artifact_without_lightning_lora(
    kind: str, runs: dict[str, Merged], opened: dict[str, dict[str, Any]]
) -> None:
    run, found = runs[kind], opened[kind]
    assert same(found["state"], run.module.state_dict())
    assert found["hparams"] == dict(run.module.hparams)
    assert torch.equal(found["outputs"], outputs(run.module))
    torch.testing.assert_close(found["outputs"], run.adapted_outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["regression", *LANGUAGES])
def test_the_adapters_make_a_difference_that_the_merge_keeps(kind: str, runs: dict[str, Merged]) -> None:
    untrained = Eager() if kind == "regression" else Language(kind)
    assert (outputs(untrained) - runs[kind].adapted_outputs).abs().max() > 0.02


@pytest.mark.parametrize("kind", LANGUAGES)
def test_transformers_own_classes_open_the_folder_with_equal_outputs(
    kind: str, runs: dict[str, Merged], opened: dict[str, dict[str, Any]]
) -> None:
    run, found = runs[kind], opened[kind]
    assert torch.equal(found["pretrained outputs"], outputs(run.module))
    assert found["dtype"] == "torch.float32"
    assert found["body outputs"].shape[:2] == found["pretrained outputs"].shape[:2]


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama-tied", True), ("gpt2", True), ("bert", True)])
def test_tied_embeddings_stay_tied(
    kind: str, tied: bool, runs: dict[str, Merged], opened: dict[str, dict[str, Any]]
) -> None:
    model = runs[kind].module.model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    assert opened[kind]["tied"] is tied
    untrained = Language(kind).model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, untrained)


@pytest.mark.parametrize("kind", ["regression", *LANGUAGES])
def test_the_report_says_where_the_artifact_is_and_how_exact(kind: str, runs: dict[str, Merged]) -> None:
    report = runs[kind].callback.merge_report
    assert report is not None
    assert report.folder == str(runs[kind].folder)
    assert report.max_relative_error < 1e-5
    assert report.output_difference is not None
    assert report.output_difference.relative < 1e-3
    assert (runs[kind].folder / "merge_report.json").is_file()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_transformers_model_merges_into_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = Language("llama")
    module.model.to(dtype)
    callback = lora(merge_on_fit_end=MergeConfig(output_dir=str(tmp_path / "artifact"), tolerance=1.0))
    quiet_trainer(tmp_path, callback, epochs=1).fit(module, token_loader(), token_loader())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact" / "model")
    assert model.dtype == module.model.dtype == dtype
    assert same(model.state_dict(), module.model.state_dict())


def test_a_half_precision_model_can_be_written_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = Language("llama")
    module.model.to(torch.bfloat16)
    merge_config = MergeConfig(output_dir=str(tmp_path / "artifact"), dtype="float32", tolerance=1.0)
    callback = lora(merge_on_fit_end=merge_config)
    quiet_trainer(tmp_path, callback, epochs=1).fit(module, token_loader(), token_loader())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact" / "model")
    assert model.dtype == torch.float32
    assert callback.merge_report is not None
    assert callback.merge_report.max_relative_error < 1e-5
