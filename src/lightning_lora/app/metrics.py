"""What a run measured: as a file for programs, and the one number that a sweep compares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

METRICS_FILE = "metrics.json"


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """Return what the trainer's last stage logged, as plain numbers."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def write_metrics(folder: Path, *, metrics: Mapping[str, float], seconds: float) -> Path:
    """Write ``metrics.json`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS_FILE
    content: dict[str, Any] = {"metrics": dict(metrics), "seconds": round(seconds, 3)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def chosen_metric(metrics: Mapping[str, float], name: str | None) -> float | None:
    """Return the metric that a sweep asked for, or None if it asked for none.

    Raises:
        ValueError: If the run logged no metric of this name.
    """
    if name is None:
        return None
    if name not in metrics:
        raise ValueError(f"optimized_metric={name!r} was not logged. Logged: {sorted(metrics) or 'nothing'}.")
    return metrics[name]
