"""The guard fails where a committed row got worse, and says where it can't tell."""

from __future__ import annotations

import json

import pytest

from benchmarks import guard, step

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def row(time=0.8, saved=650, passed=True):
    return {
        "ratios": {"ours_to_peft": {"median": time}},
        "memory": {"ours": {"saved_bytes": saved}, "peft": {"saved_bytes": 1000}},
        "self_test": {"passed": passed},
    }


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (row(), "ok"),
        (row(time=0.839), "ok"),
        (row(time=0.5, saved=600), "ok"),
        (row(time=0.841), "slower"),
        (row(saved=690), "keeps more"),
        (row(time=0.9, passed=False), "unsure"),
        (row(saved=690, passed=False), "keeps more"),
    ],
)
def test_five_percent_are_lost_or_not(now, expected):
    assert guard.verdict(row(), now) == expected
    assert guard.verdict(row(passed=False), now) in ("unsure", "keeps more")


@pytest.mark.parametrize(("factor", "expected"), [(1e6, (0, 2)), (1e-6, (1, 2))])
def test_a_record_is_measured_again_and_judged(tmp_path, capsys, factor, expected):
    path = tmp_path / "step-tiny.json"
    small = ["--shape", "tiny", "--precision", "fp32", "--targets", "q+v", "--dropout", "0", "--batch", "1"]
    step.main([*small, "--length", "8", "--rounds", "1", "--output", str(path)])
    record = json.loads(path.read_text())
    record["rows"][0]["ratios"]["ours_to_peft"]["median"] *= factor
    path.write_text(json.dumps(record))
    assert guard.main([str(path)]) in expected  # 2: one round of a tiny model may fail its self-test
    assert "step-tiny: fp32, q+v, dropout 0.0" in capsys.readouterr().out
