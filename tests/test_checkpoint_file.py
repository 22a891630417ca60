"""Opening a file: what is a checkpoint, what is a damaged one, and no code of it is run."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import CheckpointError
from lightning_lora.checkpoint_file import MANIFEST, check_checkpoint, read_checkpoint

CHECKPOINT: dict[str, Any] = {
    "state_dict": {"a": torch.arange(64.0)},
    "pytorch-lightning_version": "2.6.1",
    "loops": {"fit_loop": {}},
    "optimizer_states": [{"state": {0: {}}, "param_groups": [{"params": [0]}]}],
    "lr_schedulers": [{"last_epoch": 1}],
    "callbacks": {},
    "hyper_parameters": {"width": 3},
    MANIFEST: {},
}


def test_a_right_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.save(CHECKPOINT, tmp_path / "right.ckpt")
    found = read_checkpoint(tmp_path / "right.ckpt")
    assert list(found) == list(CHECKPOINT)
    assert torch.equal(found["state_dict"]["a"], CHECKPOINT["state_dict"]["a"])


@pytest.mark.parametrize("version", ["2.6.1", "2.6.0.post0", "1.9.5", "2.7.0rc1", "2.6.6+local"])
def test_any_lightning_version_will_do(version: str) -> None:
    check_checkpoint({**CHECKPOINT, "pytorch-lightning_version": version}, "path", local=False)


@pytest.mark.parametrize("entry", ["optimizer_states", "lr_schedulers", "callbacks", "hyper_parameters"])
def test_what_a_weights_only_file_lacks_may_be_absent(entry: str) -> None:
    check_checkpoint({key: value for key, value in CHECKPOINT.items() if key != entry}, "path", local=False)


def test_a_plain_file_of_older_lightning_needs_no_loops() -> None:
    plain = {key: value for key, value in CHECKPOINT.items() if key not in ("loops", MANIFEST)}
    check_checkpoint(plain, "path", local=False)
    with pytest.raises(CheckpointError, match="its 'loops' is not usable"):
        check_checkpoint({**plain, MANIFEST: {}}, "path", local=False)


def test_the_old_format_of_torch_is_read_too(tmp_path: Path) -> None:
    torch.save(CHECKPOINT, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert set(read_checkpoint(tmp_path / "old.ckpt")) == set(CHECKPOINT)


@pytest.mark.parametrize("manifest", [True, False])
def test_bytes_are_checked_in_files_of_ours(manifest: bool, tmp_path: Path) -> None:
    content = CHECKPOINT if manifest else {key: value for key, value in CHECKPOINT.items() if key != MANIFEST}
    file = io.BytesIO()
    torch.save(content, file)
    damaged = bytearray(file.getvalue())
    damaged[bytes(damaged).index(torch.arange(64.0).numpy().tobytes()) + 100] ^= 1
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damaged)
    if manifest:
        with pytest.raises(CheckpointError, match=r"the checksum of .*/data/0 is wrong"):
            read_checkpoint(path)
    else:
        read_checkpoint(path)


def test_a_damaged_table_of_contents_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    torch.save(CHECKPOINT, path)
    with zipfile.ZipFile(path) as file:
        offset = file.infolist()[-1].header_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = b"XXXX"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


def test_every_broken_entry_is_named() -> None:
    broken = {**CHECKPOINT, "callbacks": 3, "lr_schedulers": 4}
    with pytest.raises(CheckpointError, match=r"file\.ckpt is damaged: its 'callbacks', 'lr_schedulers' is not usable"):
        check_checkpoint(broken, "file.ckpt", local=False)
