"""Imports flow one way, and optional packages stay where they belong: read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lightning_lora"

# A module may import from its own group and from those above it, never from below.
GROUPS = (
    (
        "errors",
        "config",
        "adapter",
        "checkpoint_file",
        "class_swap",
        "device_memory",
        "functional",
        "fused",
        "lightning_names",
        "patches",
        "report",
        "sample",
        "version",
        "weight_files",
        "streaming",
    ),
    ("frozen_layer", "layers", "quantized_layer", "quantization", "fresh", "dense_models", "kept_weights", "record"),
    ("targets", "lora", "frozen", "fingerprint"),
    ("quantized_base",),
    ("gradient_checkpointing",),
    ("injection", "originals"),
    (
        "checkpoint",
        "merging",
        "export",
        "hyperparameters",
        "optimizers",
        "planning",
    ),
    (
        "averaging",
        "callback",
        "fit_end",
        "flat",
        "guards",
        "hooks",
        "liger",
        "load",
        "memory_log",
        "optimizer_swap",
        "random_state",
        "tracking",
    ),
    ("sft",),
    ("app",),
)
# Who may import a package; where it is optional, only inside the function that needs it.
LIGHTNING = {*GROUPS[7], "sft", "app"}
OPTIONAL = {
    "huggingface_hub": {"weight_files"},
    "transformers": {"fresh", "export", "liger", "merging", "planning", "targets", "sft"},
    "triton": {"fused"},
    "liger_kernel": {"liger"},
    "hydra": {"app"},
    "omegaconf": {"app", "hyperparameters", "load"},
    "wandb": set[str](),
    "typer": {"app"},
    "matplotlib": {"sft"},
    "gguf": {"sft"},
    "peft": set[str](),
    "bitsandbytes": {"quantization", "optimizer_swap"},
}
ITS_OWN_DEPENDENCY = {
    ("fused", "triton"),  # in a module of its own, imported when it is asked for
    ("quantization", "bitsandbytes"),
    ("optimizer_swap", "bitsandbytes"),
    ("sft", "transformers"),
    ("app", "hydra"),
    ("app", "omegaconf"),
}


class Import(NamedTuple):
    """One import statement."""

    module: str  # dotted name of the importing module below lightning_lora
    imported: str  # dotted name of what it imports
    at_top: bool  # executed when the module is imported

    @property
    def owner(self) -> str:
        return self.module.split(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    yield from walk(ast.parse(path.read_text()), module, at_top=True)


def walk(node: ast.AST, module: str, *, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative import"
            yield Import(module, child.module or "", at_top)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from walk(child, module, at_top=at_top and not inside)


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] != "conf"]
IMPORTS = [item for path in MODULES if path != SOURCE / "__init__.py" for item in imports_of(path)]
GROUP_OF = {name: index for index, group in enumerate(GROUPS) for name in group}


def test_every_module_has_its_place_in_the_order() -> None:
    found = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert found == set(GROUP_OF)


def test_imports_flow_one_way() -> None:
    wrong = [
        f"{item.module} imports {item.imported}"
        for item in IMPORTS
        if item.imported.startswith("lightning_lora.")
        and GROUP_OF.get(item.imported.split(".")[1], 0) > GROUP_OF.get(item.owner, 99)
    ]
    assert not wrong


def test_the_core_never_imports_the_root_package_at_import_time() -> None:
    wrong = [item for item in IMPORTS if item.imported == "lightning_lora" and item.at_top]
    assert not [item for item in wrong if item.owner not in ("app", "sft")]


def test_no_circle_of_modules() -> None:
    edges: dict[str, set[str]] = {}
    for item in IMPORTS:
        if item.at_top and item.imported.startswith("lightning_lora."):
            edges.setdefault(item.module, set()).add(item.imported.removeprefix("lightning_lora."))
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in edges.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_lightning_is_known_only_at_the_top() -> None:
    wrong = {item.module for item in IMPORTS if item.imported.split(".")[0] == "lightning"}
    assert {module.split(".")[0] for module in wrong} <= LIGHTNING


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_is_imported_only_where_it_belongs_and_only_when_needed(package: str) -> None:
    users = [item for item in IMPORTS if item.imported.split(".")[0] == package]
    assert {item.owner for item in users} <= OPTIONAL[package]
    eager = {item.owner for item in users if item.at_top}
    assert all((owner, package) in ITS_OWN_DEPENDENCY for owner in eager)


def test_importing_the_package_brings_no_optional_package_in() -> None:
    # Lightning and torchmetrics bring in what they find installed, matplotlib and transformers among it.
    code = (
        "import sys, torchmetrics, lightning.pytorch, lightning.pytorch.loggers; before = set(sys.modules); "
        "import lightning_lora; print(*(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(result.stdout.split())
    assert "lightning_lora.callback" in loaded
    assert not loaded & {*OPTIONAL, "lightning_lora.sft", "lightning_lora.app"}


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "helpers", "misc", "common", "base", "types"}
