"""After a multirun: one table of all its jobs, read from the files they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_lora.app.metrics import METRICS_FILE

SHOWN = ("val/", "test/")


class SweepSummary(Callback):
    """Hydra callback that prints the jobs of a multirun, their overrides and their metrics."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, if any job of the sweep left its metrics."""
        jobs = read_jobs(Path(config.hydra.sweep.dir))
        if jobs:
            Console().print(sweep_table(jobs))


def read_jobs(folder: Path) -> list[tuple[str, list[str], dict[str, float]]]:
    """Return (folder name, overrides, metrics) of each job in a sweep's folder, in the order they ran."""
    jobs = []
    for path in sorted(folder.glob(f"*/{METRICS_FILE}"), key=lambda path: (len(path.parent.name), path.parent.name)):
        overrides = OmegaConf.to_container(OmegaConf.load(path.parent / ".hydra" / "overrides.yaml"))
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        jobs.append((path.parent.name, [str(item) for item in overrides or []], metrics))
    return jobs


def sweep_table(jobs: list[tuple[str, list[str], dict[str, float]]]) -> Table:
    """Lay the jobs out as a rich table: one row a job, one column a metric, no override that all share."""
    shared = set.intersection(*(set(overrides) for _, overrides, _ in jobs)) if len(jobs) > 1 else set()
    names = sorted({name for _, _, metrics in jobs for name in metrics if name.startswith(SHOWN)})
    table = Table("job", "overrides", *names, title="sweep")
    for job, overrides, metrics in jobs:
        values = (f"{metrics[name]:.4f}" if name in metrics else "" for name in names)
        table.add_row(job, " ".join(item for item in overrides if item not in shared), *values)
    return table
