"""Run a function in a real new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

_CHILD = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
import importlib, torch
call = torch.load(sys.argv[1], weights_only=False)
torch.set_num_threads(call["threads"])
function = getattr(importlib.import_module(call["module"]), call["function"])
torch.save(function(*call["args"]), sys.argv[1])
"""


def in_new_process(function: Callable[..., Any], *args: Any, without: tuple[str, ...] = ("no_such_package",)) -> Any:
    """What ``function(*args)`` returns in a new interpreter, in which importing a package of ``without`` fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call.pt"
        call = {"module": function.__module__, "function": function.__name__, "args": args}
        torch.save({**call, "threads": torch.get_num_threads()}, path)
        source = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _CHILD, str(path), ",".join(without)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": source, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        return torch.load(path, weights_only=False)
