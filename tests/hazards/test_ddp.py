"""Hazard: several processes: unequal adapters, a merge or file by each of them, a rank that waits for ever.

Two real processes over gloo, all cases in one pair of them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, inject_adapters
from tests.conftest import TinyModule
from tests.hazards.runs import digest, is_adapter_only
from tests.states import adapters_of, read

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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


def run_on_two_ranks(program: str, folder: Path) -> list[dict[str, Any]]:
    """Start a module in two processes, and read what each of them noted."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", program, str(folder)]
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


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_two_ranks("tests.hazards.ddp_runs", folder)


@pytest.mark.parametrize("run", ["start", "whole", "flat", "parts", "other_base", "lazy", "unused", "quantized"])
def test_adapters_and_base_are_identical_on_all_ranks_without_a_seed(ranks: Any, run: str) -> None:
    assert ranks[0][run]["adapters"] == ranks[1][run]["adapters"]
    assert ranks[0][run]["base"] == ranks[1][run]["base"]


@pytest.mark.parametrize("run", ["whole", "flat", "parts", "other_base", "lazy", "quantized"])
def test_every_adapter_trains(ranks: Any, run: str) -> None:
    assert [rank[run]["trained"] for rank in ranks] == [True, True]


def test_the_start_is_the_one_that_this_process_draws_too(ranks: Any) -> None:
    module = TinyModule()
    inject_adapters(module, LoRAConfig(rank=2, alpha=4, init="gaussian"))
    assert ranks[0]["start"]["adapters"] == digest(adapters_of(module))


def test_with_a_flat_optimizer_the_run_is_the_one_without_it(ranks: Any) -> None:
    assert ranks[0]["flat"]["close"]


def test_a_resume_is_bitwise(ranks: Any) -> None:
    assert ranks[0]["parts"]["adapters"] == ranks[0]["whole"]["adapters"]
    assert ranks[0]["parts"]["step"] == 4


def test_checkpoints_hold_adapters_only_under_clean_keys(ranks: Any) -> None:
    path = ranks[0]["parts"]["path"]
    assert is_adapter_only(path)
    assert not [key for key in read(path)["state_dict"] if key.startswith("module.")]


def test_a_wrong_base_is_refused_on_every_rank(ranks: Any) -> None:
    assert [rank["wrong_base"]["error"] for rank in ranks] == ["BaseMismatchError"] * 2


def test_quantized_bases_that_differ_are_refused_on_every_rank(ranks: Any) -> None:
    assert ["different quantized bases" in rank["other_quantized_base"]["error"] for rank in ranks] == [True, True]
    assert "compared with rank 0, the values of" in ranks[1]["other_quantized_base"]["error"]


def test_a_target_layer_that_is_not_used_is_warned_of_and_the_others_train(ranks: Any) -> None:
    assert ranks[0]["unused"]["warned"]
    assert [rank["unused"]["others trained"] for rank in ranks] == [True, True]


def test_a_target_layer_that_is_not_used_is_the_usual_error_of_ddp_without_the_search(ranks: Any) -> None:
    assert "find_unused_parameters=True" in ranks[0]["unused_without_search"]["error"]


@pytest.mark.parametrize("run", ["merge", "merge_with_logger"])
def test_rank_zero_alone_writes_the_merged_folder_and_every_rank_is_merged(ranks: Any, folder: Path, run: str) -> None:
    assert [rank[run]["plain"] for rank in ranks] == [True, True]
    assert ranks[0][run]["merged"] == ranks[1][run]["merged"]
    assert ranks[1][run]["folder"] == ranks[0][run]["folder"]
    merged = Path(ranks[0][run]["folder"])
    assert (merged / "merged.ckpt").is_file()
    assert len(list((folder / run).rglob("merged.ckpt"))) == 1
    assert not list((folder / run).rglob(".merged-*"))


@pytest.mark.parametrize("run", ["merge", "merge_with_logger"])
def test_after_the_merge_the_best_checkpoint_scores_the_same_on_every_rank(ranks: Any, run: str) -> None:
    for rank in ranks:
        first, best = rank[run]["scores"]
        assert best == pytest.approx(first, rel=1e-5)


def test_a_merge_that_is_refused_is_refused_on_every_rank(ranks: Any) -> None:
    assert [rank["failing_merge"]["error"] for rank in ranks] == ["MergeError"] * 2
    assert [rank["failing_merge"]["trained"] for rank in ranks] == [True, True]


def test_a_merge_that_rank_zero_cannot_write_is_an_error_on_every_rank_at_once(ranks: Any) -> None:
    assert [rank["unwritable_merge"]["error"] for rank in ranks] == ["MergeError"] * 2
    assert "Rank zero could not write" in ranks[1]["unwritable_merge"]["message"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    place = tmp_path_factory.mktemp("forked")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "tests.hazards.fork_runs", str(place)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((place / "results.json").read_text()), result.stderr


def test_forked_training_leaves_the_main_module_untrained_and_says_so(forked: Any) -> None:
    results, errors = forked
    assert not results["False"]["moved"]
    assert results["False"]["adapters"] == 0
    assert results["False"]["adapter only"]
    assert errors.count("the module there stays without adapters") == 1


def test_forked_training_with_a_merge_gives_the_main_module_the_merged_weights(forked: Any) -> None:
    results, _ = forked
    assert results["True"]["moved"]
    assert results["True"]["adapters"] == 0
    assert len(results["True"]["merged"]) == 1
