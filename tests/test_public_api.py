"""The root package's surface: what ``__all__`` says, and nothing else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import lightning_lora

PUBLIC = sorted(lightning_lora.__all__)
ROOT = Path(__file__).parents[1]


def test_all_is_sorted_the_way_ruff_sorts_and_has_no_doubles() -> None:
    assert len(set(lightning_lora.__all__)) == len(lightning_lora.__all__)


def test_all_is_exactly_what_can_be_seen() -> None:
    visible = {
        name
        for name, value in vars(lightning_lora).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    lazy = set(PUBLIC) - visible
    assert visible <= set(PUBLIC)
    assert all(hasattr(lightning_lora, name) for name in lazy)


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.startswith("__")])
def test_every_public_name_has_a_docstring(name: str) -> None:
    doc = inspect.getdoc(getattr(lightning_lora, name))
    assert doc
    assert not doc.startswith(f"{name}("), "that is the signature which dataclasses make up"


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(getattr(lightning_lora, name))])
def test_every_public_function_documents_each_of_its_parameters(name: str) -> None:
    value = getattr(lightning_lora, name)
    doc = inspect.getdoc(value) or ""
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter} is not documented"


def test_every_error_of_the_package_can_be_caught_by_its_base() -> None:
    errors = [value for name in PUBLIC if inspect.isclass(value := getattr(lightning_lora, name))]
    errors = [error for error in errors if issubclass(error, Exception)]
    assert len(errors) > 1
    assert all(issubclass(error, lightning_lora.LightningLoRAError) for error in errors)


def test_version_is_the_changelogs_or_newer() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", lightning_lora.__version__)
    assert not versions or lightning_lora.__version__.startswith(versions[0])
