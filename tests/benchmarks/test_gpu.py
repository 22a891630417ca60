"""The script for a lent GPU runs from end to end, on tiny shapes on a CPU."""

import json

import pytest
import torch

from benchmarks import gpu

pytest.importorskip("peft", reason="the benchmarks compare with peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_part_runs_and_is_recorded(tmp_path):
    threads = torch.get_num_threads()
    assert gpu.main(["--tiny", "--rounds", "1", "--output", str(tmp_path / "gpu.json")]) == 0
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert max(row["largest_difference"] for row in record["layers"]) < 0.02
    assert [row["largest_difference"] < 1e-5 for row in record["kernels"]] == [True]
    for part in ("dense", "dense, dropout", "nf4"):
        assert record[part]["peak_bytes"]["ours"] < record[part]["peak_bytes"]["peft"]
    assert record["whole"]["ours"]["loss"] == pytest.approx(record["whole"]["peft"]["loss"], abs=0.2)
