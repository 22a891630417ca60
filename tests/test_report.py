"""What a report says, as a table and as data."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from torch import nn

from lightning_lora import InjectionReport, LoRAConfig, inject_adapters
from tests.targets.architectures import build


def text(report: InjectionReport, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(report)
    return file.getvalue()


@pytest.fixture
def report() -> InjectionReport:
    net = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 12), "norm": nn.BatchNorm1d(12)}) for _ in range(3)
            ),
            "mid": nn.Linear(12, 4, bias=False),
            "head": nn.Linear(4, 2),
            "extra": nn.Linear(4, 4),
        }
    )
    return inject_adapters(net, LoRAConfig(rank=2, alpha=6, rank_pattern={"mid": 3}, modules_to_save=["extra"]))


def test_every_row_has_the_numbers_of_its_layer(report: InjectionReport) -> None:
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["blocks.0.up", "blocks.1.up", "blocks.2.up", "mid"]
    up, mid = rows["blocks.0.up"], rows["mid"]
    assert (up.type, up.shape, up.rank, up.alpha, up.scaling) == ("Linear", (12, 8), 2, 6.0, 3.0)
    assert (up.trainable, up.total) == (2 * (12 + 8), 2 * (12 + 8) + 12 * 8 + 12)
    assert (mid.rank, mid.scaling, mid.trainable, mid.total) == (3, 2.0, 48, 96)


def test_totals_are_sums(report: InjectionReport) -> None:
    assert report.trainable_parameters == 3 * 40 + 48 + 20
    assert report.total_parameters == 3 * (40 + 96 + 12 + 24) + 96 + 10 + 20
    assert report.trainable_share == report.trainable_parameters / report.total_parameters
    assert report.summary == "4 layers adapted: 188 of 642 parameters train (29.283%)"


def test_it_lists_what_is_saved_and_what_was_skipped_and_why(report: InjectionReport) -> None:
    assert dict(report.saved) == {"extra.weight": 16, "extra.bias": 4}
    assert "output head" in report.skipped["head"]
    assert report.skipped["extra"] == "trained in full (modules_to_save)"
    assert report.notes == ("3 norm layers keep their running statistics (they stay in eval mode)",)


def test_it_is_plain_json(report: InjectionReport) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert values["trainable_parameters"] == 188
    assert values["layers"][0]["shape"] == [12, 8]
    assert values["saved"] == {"extra.weight": 16, "extra.bias": 4}
    assert values["adapter"] == "default"
    assert values["kind"] == "lora"


def test_the_table_shows_layers_that_differ_in_their_index_in_one_line(report: InjectionReport) -> None:
    lines = [" ".join(line.replace("│", " ").split()) for line in text(report).splitlines()]
    assert "blocks.*.up 3 12 x 8 2 6 120 444" in lines
    assert "mid 1 4 x 12 3 6 48 96" in lines
    assert "trained in full: extra.weight (16)" in lines
    assert any(line.startswith("not adapted: head: output head") for line in lines)
    assert lines[-1] == report.summary


def test_a_deep_model_prints_on_one_screen() -> None:
    report = inject_adapters(build("llama"), LoRAConfig(rank=2))
    assert len(report.layers) == 28
    assert len(text(report).splitlines()) < 20


def test_blocks_with_other_ranks_are_not_put_together() -> None:
    report = inject_adapters(
        build("llama"), LoRAConfig(rank=2, target_modules="q_proj", rank_pattern={"layers.0.self_attn.q_proj": 4})
    )
    shown = text(report)
    assert "model.layers.0.self_attn.q_proj" in shown
    assert "model.layers.*.self_attn.q_proj" in shown


def test_a_narrow_terminal_shows_the_whole_name() -> None:
    report = inject_adapters(build("llama"), LoRAConfig(rank=2, target_modules="model.layers.0.self_attn.q_proj"))
    shown = "".join(text(report, width=60).split())
    assert "…" not in shown
