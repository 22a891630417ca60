"""Two real processes over gloo train the same adapters on the same quantized base, resume bitwise, and merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hazards.runs import is_adapter_only
from tests.hazards.test_ddp import run_on_two_ranks

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(sys.platform == "win32", reason="gloo over loopback is not set up there"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_two_ranks("tests.quantization.ddp_runs", folder)


@pytest.mark.parametrize("form", ["nf4-double", "int8"])
def test_both_ranks_train_the_same_adapters_and_keep_codes_and_scales(form: str, ranks: Any) -> None:
    assert ranks[0][form] == ranks[1][form]
    assert ranks[0][form]["whole"]["trained"]
    assert ranks[0][form]["whole"]["codes"] == ranks[0][form]["whole"]["codes before"]


@pytest.mark.parametrize("form", ["nf4-double", "int8"])
def test_a_resume_is_bitwise_and_files_hold_adapters_only(form: str, ranks: Any, folder: Path) -> None:
    assert ranks[0][form]["resumed"] == ranks[0][form]["whole"]
    assert is_adapter_only(folder / form / "whole" / "epoch=1.ckpt")


@pytest.mark.parametrize("form", ["nf4-double", "int8"])
def test_every_rank_is_merged_to_dense_weights_and_one_folder_is_written(form: str, ranks: Any, folder: Path) -> None:
    assert ranks[1][form]["merged"]["dense"]
    assert len(list((folder / form).rglob("merged.ckpt"))) == 1
