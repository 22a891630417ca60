"""A job leaves neither a process group nor the launcher's variables to the next one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed

from lightning_lora.app.distributed import own_process_group


def test_a_process_group_of_the_job_ends_with_it(tmp_path: Path) -> None:
    with own_process_group():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    assert not torch.distributed.is_initialized()


def test_the_launchers_variables_are_as_they_were_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError), own_process_group():
        os.environ.update(WORLD_SIZE="2", LOCAL_RANK="0")
        raise RuntimeError
    assert "WORLD_SIZE" not in os.environ
    assert os.environ["LOCAL_RANK"] == "1"


def test_a_process_group_that_was_there_before_stays(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with own_process_group():
            pass
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
