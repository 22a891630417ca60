"""What a run's loggers learn about its adapters, whichever loggers the Trainer has.

Scalars go through ``log_hyperparams`` and ``log_metrics``, which every Lightning logger has. A table goes
where the logger has a place for one: W&B's tables, TensorBoard's text, a CSV file beside ``metrics.csv``.
No tracking library is imported here; the Trainer's own logger does that.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_lora.lightning_names import is_a

Row = Mapping[str, Any]
Cell = str | int | float | None


class Report(Protocol):
    """What is needed of an injection or merge report: plain types, and the list ``layers``."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers."""
        ...


def log_run(trainer: Trainer, *, hyperparameters: Mapping[str, Any], report: Report) -> None:
    """Log how the model is adapted: hyper-parameters, the trainable share, and a table of the layers.

    Args:
        trainer: Its loggers receive everything; only the process of rank zero logs.
        hyperparameters: Of the adapters, plain types; logged under ``lora``.
        report: The injection report.
    """
    content = report.to_dict()
    trainable, total = content["trainable_parameters"], content["total_parameters"]
    counts = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total if total else 0.0,
        "adapted_layers": len(content["layers"]),
    }
    for logger in _loggers(trainer):
        logger.log_hyperparams({"lora": {**hyperparameters, **counts}})
        _log_table(logger, "lora/injection", content["layers"], step=trainer.global_step)


def log_checkpoint_bytes(trainer: Trainer, size: int) -> None:
    """Log the size in bytes of a checkpoint just written, as the metric ``lora/checkpoint_bytes``."""
    _log_metrics(trainer, {"lora/checkpoint_bytes": float(size)})


def log_memory(trainer: Trainer, *, planned: int | None, measured: int | None) -> None:
    """Log the peaks of a batch in bytes, as ``lora/planned_peak_bytes`` and ``lora/measured_peak_bytes``."""
    peaks = {"lora/planned_peak_bytes": planned, "lora/measured_peak_bytes": measured}
    _log_metrics(trainer, {name: float(size) for name, size in peaks.items() if size is not None})


def log_merge(trainer: Trainer, report: Report) -> None:
    """Log a merge: its errors, the difference of the outputs where measured, and a table of the layers."""
    content = report.to_dict()
    errors = {name: content.get(name) for name in ("relative_error", "max_relative_error")}
    outputs = {f"output_{name}": value for name, value in (content.get("output_difference") or {}).items()}
    measured = {f"lora/merge_{name}": float(v) for name, v in {**errors, **outputs}.items() if v is not None}
    _log_metrics(trainer, measured)
    for logger in _loggers(trainer):
        _log_table(logger, "lora/merge", content["layers"], step=trainer.global_step)


def _loggers(trainer: Trainer) -> Sequence[Logger]:
    return trainer.loggers if trainer.is_global_zero else ()


def _log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    for logger in _loggers(trainer):
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()


def _log_table(logger: Any, key: str, rows: Sequence[Row], *, step: int) -> None:
    """Log ``rows`` as a table if ``logger`` can show one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    if is_a(logger, "WandbLogger"):
        logger.log_table(key, columns=columns, data=cells)
    elif is_a(logger, "TensorBoardLogger"):
        logger.experiment.add_text(key, _markdown(columns, cells), step)
    elif is_a(logger, "CSVLogger"):
        _write_csv(Path(logger.log_dir) / f"{key.replace('/', '_')}.csv", columns, cells)


def _cell(value: Any) -> Cell:
    """Make one value fit a table: a shape becomes ``64 x 32``; W&B wants one type a column."""
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
