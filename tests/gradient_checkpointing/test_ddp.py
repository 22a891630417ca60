"""DistributedDataParallel: two real processes over gloo get the gradients that they get without."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gradient_checkpointing.cases import assert_same
from tests.gradient_checkpointing.ddp_runs import RUNS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(sys.platform == "win32", reason="gloo over loopback is not set up there"),
]
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("ddp")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gradient_checkpointing.ddp_runs", str(folder)]
    logs = [(folder / f"rank{rank}.txt").open("w+") for rank in range(2)]
    with logs[0], logs[1]:
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **shared, "PYTHONPATH": path, "RANK": str(rank)},
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
    assert codes == [0, 0], "\n".join((folder / f"rank{rank}.txt").read_text()[-4000:] for rank in range(2))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_those_without_on_every_rank(ranks: Any, run: str) -> None:
    for rank in ranks:
        without, found = rank[run]
        assert len(without) > 0
        assert_same(found, without)
    assert_same(ranks[0][run][1], ranks[1][run][1])
