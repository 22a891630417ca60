"""The JSON file of one benchmark run: what was measured, where, when, and with which versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "transformers", "peft", "lightning-lora")


def environment() -> dict[str, Any]:
    """Machine, versions, date and load, as plain types."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.orig_argv[1:]),
        "commit": commit(),
        "machine": {
            "processor": processor(),
            "logical_cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "amx_bf16": "amx_bf16" in cpu_flags(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "load_average_before": load_average(),
    }


def write(path: str | Path, *, benchmark: str, environment: Mapping[str, Any], **content: Any) -> Path:
    """Write one run's record, over an earlier one of the same name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": benchmark, **environment, "load_average_after": load_average(), **content}
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load_average() -> list[float] | None:
    """The 1, 5 and 15 minute load, or None where the system has none (Windows)."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, marked when the tree has changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """The processor's name as the kernel gives it, else what Python knows."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the first core; empty where the kernel does not list them."""
    return frozenset(cpu_field("flags").split())


def cpu_field(name: str) -> str:
    """One field of /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
