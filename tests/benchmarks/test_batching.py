"""The benchmark of batching runs on a tiny model, and its figures are what they say."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import batching
from lightning_lora.sft.batching import BATCHING


def test_each_way_is_measured_over_the_same_examples(tiny_pretrained, tmp_path, capsys):
    record = tmp_path / "batching.json"
    batching.main(
        ["--pretrained", tiny_pretrained, "--examples", "40", "--batch", "4", "--rounds", "1", "--output", str(record)]
    )
    found = json.loads(record.read_text())
    assert set(found["padding"]) == set(found["to_as_drawn"]) == set(BATCHING)
    assert found["padding"]["packed"] < found["padding"]["as_drawn"]
    saved = [found["saved_bytes"][str(chunk)] for chunk in (10**9, 512, 128, 32)]
    at_once = saved[0]
    assert min(saved) < at_once == max(saved)
    assert "time of a token / as drawn" in capsys.readouterr().out
