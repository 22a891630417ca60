"""What README and docs show works: code runs, commands exist, settings compose, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import hydra
import pytest
from typer.main import get_command

from lightning_lora.app.commands import build_app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Every call of ``program`` in a bash block: the page's name and the arguments."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == [program]:
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"readme_{page.stem}"}
    for index, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, python block {index + 1}", "exec"), namespace)


@pytest.mark.parametrize(("page", "arguments"), commands("make"))
def test_the_make_targets_exist(page: str, arguments: list[str]) -> None:
    targets = [word for word in arguments if "=" not in word]
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


@pytest.mark.parametrize(("page", "arguments"), commands("lightning-lora"))
def test_the_training_commands_compose(page: str, arguments: list[str]) -> None:
    command, *overrides = arguments
    if command == "plan":
        options = {word.split("=")[0] for word in overrides if word.startswith("--")}
        declared = {
            option for parameter in get_command(build_app()).commands["plan"].params for option in parameter.opts
        }
        assert options <= declared
        return
    assert command == "train"
    # A list of values is for a sweep; compose takes one: the first.
    single = [re.sub(r"^([\w.]+=)([^,\[{]+),.*$", r"\1\2", word) for word in overrides if "=" in word]
    with hydra.initialize_config_module("lightning_lora.conf", version_base="1.3"):
        assert hydra.compose("train", overrides=single, return_hydra_config=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_two_commands_stand_in_the_readme() -> None:
    assert {"demo", "test"} <= {word for page, words in commands("make") if page == "README.md" for word in words}


def test_there_is_something_to_test() -> None:
    assert blocks(ROOT / "README.md", "python")
    assert commands("lightning-lora")
