"""Newly initialised parameters are found where transformers tells of them, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertModel

from lightning_lora import LoRAConfig, QuantizationConfig, inject_adapters
from lightning_lora.fresh import newly_initialized
from tests.targets.architectures import build

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    bert = build("bert").bert
    assert isinstance(bert, BertModel)
    bert.save_pretrained(folder)
    return folder


@pytest.fixture
def classifier(backbone: Path) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)


HEAD = {"model.classifier.weight", "model.classifier.bias"}


def test_a_new_head_over_a_pretrained_backbone_is_found(classifier: nn.Module) -> None:
    assert set(newly_initialized(nn.ModuleDict({"model": classifier}))) == HEAD


def test_it_is_found_when_the_model_is_the_root(classifier: nn.Module) -> None:
    assert set(newly_initialized(classifier)) == {"classifier.weight", "classifier.bias"}


def test_it_is_still_the_only_one_after_the_injection(classifier: nn.Module) -> None:
    root = nn.ModuleDict({"model": classifier})
    inject_adapters(root, LoRAConfig(rank=2))
    assert set(newly_initialized(root)) == HEAD


def test_it_is_still_the_only_one_when_the_base_is_quantized(classifier: nn.Module) -> None:
    root = nn.ModuleDict({"model": classifier})
    for _ in range(2):  # a run looks twice
        report = inject_adapters(root, LoRAConfig(rank=2), quantization=QuantizationConfig())
        assert set(newly_initialized(root)) == HEAD
        assert set(report.saved) == HEAD


def test_the_injection_trains_and_reports_it_and_gives_it_no_adapter(classifier: nn.Module) -> None:
    root = nn.ModuleDict({"model": classifier})
    report = inject_adapters(root, LoRAConfig(rank=2, target_modules="all-linear"))
    trained = {name for name, p in root.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == HEAD
    assert set(report.saved) == HEAD
    assert report.skipped["model.classifier"] == "trained in full (modules_to_save)"


def test_a_fully_pretrained_model_has_none(backbone: Path) -> None:
    assert newly_initialized(AutoModel.from_pretrained(backbone)) == []


def test_a_model_built_from_a_config_gives_no_evidence() -> None:
    assert newly_initialized(build("bert")) == []


def test_modules_that_are_not_of_transformers_give_no_evidence() -> None:
    assert newly_initialized(nn.Sequential(nn.Linear(2, 2))) == []


def test_a_own_head_beside_a_pretrained_model_is_not_guessed_at(backbone: Path) -> None:
    root = nn.ModuleDict({"model": AutoModel.from_pretrained(backbone), "head": nn.Linear(16, 2)})
    assert newly_initialized(root) == []


def test_looking_changes_nothing(classifier: nn.Module) -> None:
    before = copy.deepcopy(classifier.state_dict())
    flags = [p.requires_grad for p in classifier.parameters()]
    newly_initialized(classifier)
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    assert [p.requires_grad for p in classifier.parameters()] == flags
