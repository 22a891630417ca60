"""DistributedDataParallel: two real processes over gloo get the gradients that they get without."""

from __future__ import annotations

import multiprocessing
import socket
import sys
from typing import Any

import pytest
import torch

from tests.gradient_checkpointing.cases import assert_same
from tests.gradient_checkpointing.ddp_runs import RUNS, main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(sys.platform != "linux", reason="forking a process with torch in it is safe on Linux only"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("transformers")
    folder, port = tmp_path_factory.mktemp("ddp"), free_port()
    # A fork has everything imported; two new processes take ten times as long.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=main, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_those_without_on_every_rank(ranks: Any, run: str) -> None:
    for rank in ranks:
        without, found = rank[run]
        assert len(without) > 0
        assert_same(found, without)
    assert_same(ranks[0][run][1], ranks[1][run][1])
