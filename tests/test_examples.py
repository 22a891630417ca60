"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = [
    ("plain_callback.py", [], "2 layers adapted"),
]


def test_every_example_is_run() -> None:
    scripts = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    in_installed_environments = {"hydra_project/main.py"}  # by test_packaging.py
    assert scripts == {name for name, _, _ in RUNS} | in_installed_environments


@pytest.mark.parametrize(("script", "arguments", "printed"), RUNS, ids=[name for name, _, _ in RUNS])
def test_example(script: str, arguments: list[str], printed: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(printed, result.stdout), result.stdout
