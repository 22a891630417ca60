"""The loss curve as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_lora.errors import MissingDependencyError

_SMOOTHED_OVER = 10


def require_matplotlib() -> None:
    """Raise a MissingDependencyError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("The loss curve is drawn with matplotlib. Run: pip install matplotlib")


def draw_loss_curve(curve: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw training and validation loss over optimizer steps into a PNG file.

    Args:
        curve: Named lines of ``(step, loss)``, as `SFTModule.curve` holds them.
        path: Where to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would choose a window system and keep the figure alive
    axes = figure.add_subplot()
    for name, points in curve.items():
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        if name == "train":
            axes.plot(steps, losses, linewidth=0.8, alpha=0.35, color="tab:blue")
            axes.plot(
                steps,
                _running_mean(losses),
                color="tab:blue",
                label=f"train (mean of {_SMOOTHED_OVER} steps)",
            )
        else:
            axes.plot(steps, losses, marker="o", color="tab:orange", label=name)
    axes.set(xlabel="optimizer step", ylabel="loss per answer token", yscale="log")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, end - _SMOOTHED_OVER) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
