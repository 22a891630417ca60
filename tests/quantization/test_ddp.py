"""Two real processes over gloo train the same adapters on the same quantized base, resume bitwise, and merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hazards.runs import is_adapter_only
from tests.hazards.test_ddp import ROOT, free_port

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
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.quantization.ddp_runs", str(folder)]
    logs = [(folder / f"rank{rank}.txt").open("w+") for rank in range(2)]
    with logs[0], logs[1]:
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **shared, "PYTHONPATH": path, "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=200) for process in processes]
        except subprocess.TimeoutExpired:
            codes = []
        for process in processes:
            process.kill()
            process.wait()
    printed = "\n".join((folder / f"rank{rank}.txt").read_text()[-4000:] for rank in range(2))
    assert codes == [0, 0], printed
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


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
