"""Bytes that are kept for the backward pass, without a clock."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="the benchmarks' models are those of transformers")

from benchmarks import models, saved, tables

pytestmark = pytest.mark.filterwarnings(
    "ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning"
)  # what PEFT calls


@pytest.mark.parametrize("case", saved.cases("tiny", 1), ids=tables.setting)
def test_every_setting_is_measured(case):
    row = saved.measure(case)
    assert set(row["saved_bytes"]) >= {"ours", "peft", "frozen"}
    assert min(row["saved_bytes"].values()) > 0
    assert ("peft-best" in row["saved_bytes"]) == (case.precision == "bf16")


def test_a_measured_row_repeats_to_the_byte():
    case = models.Case(shape="tiny", batch=1, precision="fp32")
    assert saved.measure(case) == saved.measure(case)


def test_names_tell_the_settings_apart():
    names = [tables.setting(case) for case in saved.cases("tiny", 1)]
    assert len(set(names)) == len(names)


def test_every_step_record_has_its_saved_bytes():
    """Else a column of the page would mix what two commits save; what a compiler saves is not measured here."""
    shares = tables.saved_shares()
    for path in tables.RECORDS.glob("step-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            case = models.Case(**{**row["case"], "kernels": "torch"})
            assert case.compiled or case in shares, path.name


def test_the_page_takes_saved_bytes_of_these_records_whatever_kernels_a_step_had(tmp_path):
    for path in tables.RECORDS.glob("step-llama-8x512-amx.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = [row.saved for row in tables.read(tmp_path)]
    case = models.Case(batch=4, dropout=0.05)
    rows = [{"case": vars(case), "saved_bytes": {"ours": 1, "peft": 4}}]
    (tmp_path / "saved-llama-8x512.json").write_text(json.dumps({"rows": rows}))
    assert [row.saved for row in tables.read(tmp_path)] == [before[0], 0.25]


def test_a_run_writes_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "cases", lambda shape, batch: [models.Case(shape=shape, batch=batch, precision="fp32")])
    assert saved.main(["--shape", "tiny", "--batch", "1", "--output", str(tmp_path / "saved-tiny.json")]) == 0
    assert len(tables.saved_shares(tmp_path)) == 1
