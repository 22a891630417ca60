"""How a before/after report looks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_lora.sft.chat import shown_prompt

_SHARES = {"valid_json": "valid JSON", "field_f1": "field F1", "exact_match": "exact match"}
_LONGEST_ANSWER = 400


def score_table(report: dict[str, Any]) -> Table:
    """Scores before and after, side by side."""
    table = Table(title=f"{report['base']}: {report['test_samples']} unseen test messages", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    before, after = report["before"], report["after"]
    for key, label in _SHARES.items():
        table.add_row(label, f"{before[key]:.1%}", f"[bold green]{after[key]:.1%}[/]")
    table.add_row("loss", f"{before['loss']:.3f}", f"[bold green]{after['loss']:.3f}[/]")
    return table


def sample_table(samples: Sequence[dict[str, str]]) -> Table:
    """A few messages with the answer that is right, the one before and the one after."""
    table = Table(title="The same messages before and after", title_justify="left", show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for sample in samples:
        verdict = "green" if sample["after"] == sample["expected"] else "red"
        table.add_row("message", escape(shown_prompt(sample["prompt"])))
        table.add_row("expected", escape(sample["expected"]))
        table.add_row("before", f"[dim]{escape(_shortened(sample['before']))}[/]")
        table.add_row("after", f"[{verdict}]{escape(_shortened(sample['after']))}[/]", end_section=True)
    return table


def size_line(report: dict[str, Any]) -> str:
    """Bytes of the checkpoint next to those of the base."""
    base = report["base_bytes"]
    if report["checkpoint_bytes"] is None:
        return f"base {_megabytes(base)}; no checkpoint was written"
    checkpoint, share = _megabytes(report["checkpoint_bytes"]), report["checkpoint_bytes"] / max(1, base)
    return f"checkpoint with optimizer state {checkpoint}, base {_megabytes(base)} ({share:.1%})"


def merge_lines(merge: dict[str, Any] | None) -> list[str]:
    """What the merge proof found, in a line or two."""
    if merge is None:
        return ["no merge was asked for"]
    lines = [f"merged: largest rounding error of a layer {merge['max_relative_error']:.1e} of its update"]
    if "same_answers" in merge:
        lines.append(
            f"a new process without lightning_lora opened {merge['model_folder']}: "
            f"{merge['same_answers']} of {merge['compared_answers']} greedy answers are the adapted model's"
        )
    return lines


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_ANSWER else f"{text[:_LONGEST_ANSWER]} ..."
