"""The merge benchmark compares merges of the same adapters into the same base."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="the benchmark compares with PEFT")

from benchmarks import merge, models

pytestmark = pytest.mark.filterwarnings(
    "ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning"
)  # what PEFT calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_variants_merge_to_the_same_weights_and_the_base_stays(precision):
    row = merge.measure(models.Case(shape="tiny", precision=precision), rounds=2)
    assert set(row["ratios"]) == {"ours", "ours-for-good"}
    assert set(row["median_seconds"]) == set(merge.MERGES)
    assert row["peak_bytes_above_the_model"]["ours"] > row["peak_bytes_above_the_model"]["ours-for-good"] > 0


def test_other_weights_are_noticed():
    case = models.Case(shape="tiny", precision="fp32")
    base = models.build_base(case)
    adapters = models.with_peft(base, case)
    merged = {}
    for name in ("peft", "ours"):
        variant = merge.Merging(name, base, case, adapters)
        variant.build()
        variant()
        merged[name] = variant.weights()
    merge._agree(merged)
    next(value for key, value in merged["ours"].items() if "q_proj" in key).add_(0.1)
    with pytest.raises(RuntimeError, match="q_proj"):
        merge._agree(merged)
