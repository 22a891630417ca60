"""What happens at the end of a fit that merges, and after it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from rich.console import Console
from torch import Tensor

from lightning_lora import LoRACallback, MergeConfig, MergeError, UnsupportedSetupError, unmerge_adapters
from tests.integration.lives import ADAPTERS, LIGHTNINGS_ADVICE, Recorder, best_and_last, lora, quiet_trainer
from tests.integration.networks import STEPS_PER_EPOCH, Eager, loader, vanilla_state
from tests.integration.process import ROOT
from tests.states import adapters_of, base_of, read, same

pytestmark = LIGHTNINGS_ADVICE


def fitted(
    folder: Path, merge: MergeConfig | bool, *, module: pl.LightningModule | None = None
) -> tuple[Any, pl.Trainer, LoRACallback]:
    """A fit that merges at its end."""
    module = module or Eager()
    callback = lora(merge_on_fit_end=merge)
    trainer = quiet_trainer(folder, callback, best_and_last(folder))
    trainer.fit(module, loader(), loader())
    return module, trainer, callback


def losses(trainer: pl.Trainer, module: pl.LightningModule, path: Any = None) -> float:
    tested = trainer.test(module, loader(), ckpt_path=path, verbose=False)
    return float(tested[0]["test_loss"])


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pl.Trainer, LoRACallback, Path]:
    """Two epochs, the second ruined; then a merge of the last adapters."""
    folder = tmp_path_factory.mktemp("merged")
    module, trainer, callback = fitted(folder, MergeConfig(output_dir=str(folder / "artifact")))
    return module, trainer, callback, folder


def test_the_module_is_plain_again(merged: tuple[Any, pl.Trainer, LoRACallback, Path]) -> None:
    module, vanilla = merged[0], Eager()
    assert {name: type(child) for name, child in module.named_modules()} == {
        name: type(child) for name, child in vanilla.named_modules()
    }
    assert list(module.state_dict()) == list(vanilla.state_dict())
    assert {name: p.requires_grad for name, p in module.named_parameters()} == {
        name: p.requires_grad for name, p in vanilla.named_parameters()
    }
    module.train()
    assert module.backbone[1].training
    for name, child in vanilla.named_modules():
        extra = set(vars(module.get_submodule(name))) - set(vars(child))
        assert name == "" or not extra, name


def test_the_report_proves_the_merge(merged: tuple[Any, pl.Trainer, LoRACallback, Path]) -> None:
    module, _, callback, _ = merged
    report = callback.merge_report
    assert report is not None
    assert {layer.name for layer in report.layers} == {"backbone.0", "backbone.4"}
    assert report.max_relative_error < 1e-6
    assert report.output_difference is not None
    assert 0 < report.output_difference.relative < 1e-5
    for layer in report.layers:
        moved = module.state_dict()[f"{layer.name}.weight"] - vanilla_state()[f"{layer.name}.weight"]
        assert layer.update == pytest.approx(torch.linalg.vector_norm(moved).item(), rel=1e-4)


def test_test_best_after_the_merge_gives_exactly_the_loss_of_before(tmp_path: Path) -> None:
    unmerged, plain_trainer, _ = fitted(tmp_path / "unmerged", False)
    expected = {
        name: losses(plain_trainer, unmerged, tmp_path / "unmerged" / f"{name}.ckpt") for name in ("epoch=0", "last")
    }
    module, trainer, _ = fitted(tmp_path / "merged", True)
    assert trainer.test(module, loader(), ckpt_path="best", verbose=False) == [{"test_loss": expected["epoch=0"]}]
    assert losses(trainer, module, tmp_path / "merged" / "last.ckpt") == expected["last"]
    assert expected["last"] > 1.5 * expected["epoch=0"]


def test_source_best_merges_the_best_and_not_the_last(tmp_path: Path) -> None:
    module, trainer, callback = fitted(tmp_path, MergeConfig(source="best"))
    assert callback.merge_report is not None
    assert callback.merge_report.source == "best"
    best = losses(quiet_trainer(tmp_path, lora()), Eager(), tmp_path / "epoch=0.ckpt")
    last = losses(quiet_trainer(tmp_path, lora()), Eager(), tmp_path / "last.ckpt")
    assert losses(trainer, module) == pytest.approx(best, rel=1e-5)
    assert last > 1.5 * best
    artifact = Eager.load_from_checkpoint(tmp_path / "merged" / "merged.ckpt", weights_only=True)
    assert same(artifact.state_dict(), module.state_dict())


class SlowDisk(AsyncCheckpointIO):
    """Writes in the background, and begins late."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(time.sleep, 0.5)
        super().save_checkpoint(*args, **kwargs)


def test_the_best_checkpoint_is_waited_for_while_it_is_written_in_the_background(tmp_path: Path) -> None:
    callback, recorder = lora(merge_on_fit_end=MergeConfig(source="best")), Recorder()
    trainer = quiet_trainer(tmp_path, callback, best_and_last(tmp_path), plugins=[SlowDisk()], logger=recorder)
    trainer.fit(Eager(), loader(), loader())
    assert callback.merge_report is not None
    assert callback.merge_report.source == "best"
    assert recorder.of("lora/checkpoint_bytes") == [(tmp_path / "epoch=0.ckpt").stat().st_size]


def test_source_best_without_a_monitor_is_refused_before_the_training(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, lora(merge_on_fit_end=MergeConfig(source="best")), ModelCheckpoint(tmp_path))
    with pytest.raises(UnsupportedSetupError, match="monitor"):
        trainer.fit(Eager(), loader(), loader())
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("same_callback", [True, False], ids=["same callback", "new callback"])
def test_a_fit_after_a_merge_goes_on_from_the_adapters_exactly(same_callback: bool, tmp_path: Path) -> None:
    def two_fits(folder: Path, merge: bool) -> tuple[Any, list[float]]:
        callback, recorder = lora(merge_on_fit_end=merge), Recorder()
        module = Eager(ruin=1.0)
        quiet_trainer(folder, callback, epochs=1).fit(module, loader(), loader())
        second = callback if same_callback else lora(merge_on_fit_end=merge)
        quiet_trainer(folder, second, epochs=2, logger=recorder).fit(module, loader(), loader())
        if merge:
            unmerge_adapters(module)
        return module, recorder.of("train_loss")

    never, expected = two_fits(tmp_path / "never", False)
    merged, found = two_fits(tmp_path / "merged", True)
    assert len(found) == 2 * STEPS_PER_EPOCH
    assert found == expected
    assert same(merged.state_dict(), never.state_dict())
    assert same(base_of(merged), vanilla_state())


def test_unmerge_gives_back_every_bit(tmp_path: Path) -> None:
    module, _, _ = fitted(tmp_path, True)
    changed = module.state_dict()
    assert not torch.equal(changed["backbone.0.weight"], vanilla_state()["backbone.0.weight"])
    unmerge_adapters(module)
    assert same(base_of(module), vanilla_state())
    assert same(adapters_of(module), read(tmp_path / "last.ckpt")["state_dict"])
    assert set(adapters_of(module)) == ADAPTERS
    assert not any(p.requires_grad for name, p in module.named_parameters() if ".adapters." not in name)


class Half(Eager):
    """A base in half precision."""

    dtype_of_base = torch.bfloat16

    def __init__(self) -> None:
        super().__init__(ruin=1.0)
        self.to(self.dtype_of_base)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype_of_base))


class HalfFloat(Half):
    dtype_of_base = torch.float16


@pytest.mark.parametrize("kind", [Half, HalfFloat])
def test_a_half_precision_module_merges_in_fp32_and_rounds_once(kind: type[Half], tmp_path: Path) -> None:
    module, _, callback = fitted(tmp_path, MergeConfig(tolerance=1.0), module=kind())
    report = callback.merge_report
    assert report is not None
    assert report.dtype == str(kind.dtype_of_base).removeprefix("torch.")
    saved = read(tmp_path / "last.ckpt")["state_dict"]
    for index in (0, 4):
        a, b = (saved[f"backbone.{index}.adapters.default.lora_{part}"] for part in "AB")
        assert a.dtype == b.dtype == torch.float32
        base = kind().state_dict()[f"backbone.{index}.weight"]
        expected = (base.float() + 4.0 * (b @ a)).to(kind.dtype_of_base)
        assert torch.equal(module.state_dict()[f"backbone.{index}.weight"], expected)
    assert report.max_relative_error > 1e-4
    artifact = read(tmp_path / "merged" / "merged.ckpt")["state_dict"]
    assert same(artifact, module.state_dict())


def test_an_artifact_may_be_wider_than_the_live_module(tmp_path: Path) -> None:
    module, _, callback = fitted(tmp_path, MergeConfig(dtype="float32", tolerance=1.0), module=Half())
    artifact = read(tmp_path / "merged" / "merged.ckpt")["state_dict"]
    assert {value.dtype for value in artifact.values() if value.is_floating_point()} == {torch.float32}
    assert callback.merge_report is not None
    assert callback.merge_report.dtype == "float32"
    assert callback.merge_report.max_relative_error < 1e-5
    assert module.backbone[0].weight.dtype == torch.bfloat16


def test_a_merge_beyond_the_tolerance_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    callback = lora(merge_on_fit_end=MergeConfig(tolerance=1e-9))
    trainer = quiet_trainer(tmp_path, callback, best_and_last(tmp_path))
    module = Half()
    with pytest.raises(MergeError, match=r"tolerance.*dtype=\"float32\".*untouched"):
        trainer.fit(module, loader(), loader())
    assert callback.merge_report is None
    assert not (tmp_path / "merged").exists()
    assert same(adapters_of(module), read(tmp_path / "last.ckpt")["state_dict"])
    assert same(base_of(module), base_of(Half()))
    assert losses(quiet_trainer(tmp_path, lora()), module) == losses(
        quiet_trainer(tmp_path, lora()), Half(), tmp_path / "last.ckpt"
    )


def test_diverged_adapters_are_not_merged(tmp_path: Path) -> None:
    class Diverging(Eager):
        def on_train_end(self) -> None:
            with torch.no_grad():
                self.get_parameter("backbone.0.adapters.default.lora_B").fill_(float("nan"))

    module = Diverging()
    with pytest.raises(MergeError, match=r"backbone\.0.*not finite"):
        fitted(tmp_path, True, module=module)
    assert not (tmp_path / "merged").exists()
    assert same(base_of(module), vanilla_state())


def test_an_existing_folder_is_never_written_into(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    for version in ("-v1", "-v2"):
        _, _, callback = fitted(tmp_path / f"run{version}", MergeConfig(output_dir=str(target)))
        assert callback.merge_report is not None
        assert callback.merge_report.folder == f"{target}{version}"
        assert (tmp_path / f"artifact{version}" / "merged.ckpt").is_file()
    assert [path.name for path in target.iterdir()] == ["precious.txt"]
    assert (target / "precious.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = MergeConfig(output_dir=str(tmp_path / "file" / "artifact"))
    trainer = quiet_trainer(tmp_path, lora(merge_on_fit_end=config))
    with pytest.raises(UnsupportedSetupError, match="is a file"):
        trainer.fit(Eager(), loader(), loader())
    assert trainer.global_step == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_that_fails_after_the_training_loses_nothing(tmp_path: Path) -> None:
    class Blocks(pl.Callback):
        """Puts a file where the artifact's parent folder should come, while the training goes on."""

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            (tmp_path / "later").write_text("in the way")

    callback = lora(merge_on_fit_end=MergeConfig(output_dir=str(tmp_path / "later" / "artifact")))
    trainer = quiet_trainer(tmp_path, callback, best_and_last(tmp_path), Blocks())
    module = Eager()
    with pytest.raises(MergeError, match=r"can't be written.*untouched"):
        trainer.fit(module, loader(), loader())
    assert same(adapters_of(module), read(tmp_path / "last.ckpt")["state_dict"])
    assert same(base_of(module), vanilla_state())
    assert (tmp_path / "later").read_text() == "in the way"
    # And the same module and file go on as if nothing had been tried.
    again = quiet_trainer(tmp_path, lora(), epochs=3)
    again.fit(module, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 3 * STEPS_PER_EPOCH


def test_a_folder_that_refuses_to_be_written_loses_nothing(tmp_path: Path) -> None:
    locked = Path("/proc")  # which refuses even root
    if not locked.is_dir():
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
    module = Eager()
    with pytest.raises(MergeError, match="can't be written"):
        fitted(tmp_path / "run", MergeConfig(output_dir=str(locked / "artifact")), module=module)
    assert same(adapters_of(module), read(tmp_path / "run" / "last.ckpt")["state_dict"])
    assert same(base_of(module), vanilla_state())


_KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from lightning_lora import MergeConfig
from tests.integration.lives import best_and_last, lora, quiet_trainer
from tests.integration.networks import Eager, loader

folder = Path(sys.argv[1])


def die(event, args):
    # kill -9 at the last moment before the artifact is complete
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)


callback = lora(merge_on_fit_end=MergeConfig(output_dir=str(folder / "artifact")))
trainer = quiet_trainer(folder, callback, best_and_last(folder))
module = Eager()
module.on_train_end = lambda: sys.addaudithook(die)
trainer.fit(module, loader(), loader())
"""


def test_a_kill_while_the_artifact_is_written_leaves_none_under_its_name(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "artifact").exists()
    assert list(tmp_path.glob(".artifact-*/merged.ckpt"))  # it did die in the middle of writing
    assert set(read(tmp_path / "last.ckpt")["state_dict"]) == ADAPTERS
    module, _, callback = fitted(tmp_path / "again", MergeConfig(output_dir=str(tmp_path / "artifact")))
    assert callback.merge_report is not None
    assert callback.merge_report.folder == str(tmp_path / "artifact")
    assert same(read(tmp_path / "artifact" / "merged.ckpt")["state_dict"], module.state_dict())


def test_a_file_is_saved_after_a_merge_that_only_a_raised_tolerance_allowed(tmp_path: Path) -> None:
    class Barely(Half):
        """Moves its weights by less than half precision can hold."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    module, trainer, callback = fitted(tmp_path, MergeConfig(tolerance=100.0), module=Barely())
    assert callback.merge_report is not None
    assert callback.merge_report.relative_error > MergeConfig().tolerance
    merged = {key: value.clone() for key, value in module.state_dict().items()}
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert same(read(tmp_path / "after.ckpt")["state_dict"], read(tmp_path / "last.ckpt")["state_dict"])
    assert same(module.state_dict(), merged)


@pytest.mark.parametrize("trained", ["everything", "head only"])
def test_a_plain_stage_after_a_merge_keeps_what_it_trained(trained: str, tmp_path: Path) -> None:
    module, _, _ = fitted(tmp_path / "first", True)
    module.hparams["ruin"] = 1.0
    if trained == "head only":
        module.backbone.requires_grad_(False).eval()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    second = quiet_trainer(tmp_path / "second")  # without the callback
    second.fit(module, loader(), loader())
    live = {key: value.clone() for key, value in module.state_dict().items()}
    assert not torch.equal(live["head.weight"], start["head.weight"])
    second.save_checkpoint(tmp_path / "second.ckpt")
    second.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert same(module.state_dict(), live)
    for name in ("second.ckpt", "weights.ckpt"):
        assert same(read(tmp_path / name)["state_dict"], live)
        assert same(Eager.load_from_checkpoint(tmp_path / name, weights_only=True).state_dict(), live)
    with pytest.raises(MergeError, match="not the merged one any more") if trained == "everything" else nullcontext():
        unmerge_adapters(module)


class Bypassing(Eager):
    """Reads the weight of an adapted layer beside calling the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) + torch.nn.functional.linear(x, self.backbone[0].weight))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_merge_that_changes_the_outputs_is_refused_before_anything_is_written(in_place: bool, tmp_path: Path) -> None:
    module = Bypassing(ruin=1.0, norm=False)
    with pytest.raises(MergeError, match=r"differ by \d+% of what the adapters change, .*exclude_modules.*Nothing was"):
        fitted(tmp_path, MergeConfig(in_place=in_place), module=module)
    assert not (tmp_path / "merged").exists()
    assert same(adapters_of(module), read(tmp_path / "last.ckpt")["state_dict"])
    assert same(base_of(module), base_of(Bypassing(norm=False)))


def test_a_tolerance_of_the_users_own_allows_such_a_merge(tmp_path: Path) -> None:
    _, _, callback = fitted(tmp_path, MergeConfig(tolerance=1e4), module=Bypassing(ruin=1.0, norm=False))
    assert callback.merge_report is not None
    assert callback.merge_report.output_difference is not None
    assert callback.merge_report.output_difference.relative > 0.3


def test_a_tiny_update_in_bf16_is_not_refused_for_what_rounding_does_to_the_outputs(tmp_path: Path) -> None:
    class Barely(Half):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    _, _, callback = fitted(tmp_path, MergeConfig(dtype="float32", in_place=False), module=Barely())
    assert callback.merge_report is not None
    assert (tmp_path / "merged" / "merged.ckpt").is_file()


def test_a_module_that_is_never_twice_the_same_is_merged_without_a_proof_by_outputs(tmp_path: Path) -> None:
    class Moving(Eager):
        """Its outputs drift with every call, in evaluation too."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + 0.01 * self.calls

    module, _, callback = fitted(tmp_path, True, module=Moving(ruin=1.0))
    assert callback.merge_report is not None
    assert callback.merge_report.output_difference is None
    assert type(module.backbone[0]) is torch.nn.Linear


class KeepsLast(pl.Callback):
    """Remembers the state at the end of the training."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "refused"),
    [({"in_place": False}, False), ({"tolerance": 1e-12}, True), ({"output_dir": "/proc/artifact"}, True)],
    ids=["in_place=False", "beyond the tolerance", "can't be written"],
)
def test_merging_the_best_leaves_the_last_adapters_live(options: Any, refused: bool, tmp_path: Path) -> None:
    last, module = KeepsLast(), Eager()
    callback = lora(merge_on_fit_end=MergeConfig(source="best", **options))
    trainer = quiet_trainer(tmp_path, callback, best_and_last(tmp_path), last)
    with pytest.raises(MergeError) if refused else nullcontext():
        trainer.fit(module, loader(), loader())
    assert same(module.state_dict(), last.state)
    assert not same(adapters_of(module), read(tmp_path / "epoch=0.ckpt")["state_dict"])
    assert (tmp_path / "merged").exists() is not refused


def test_the_printed_report_says_whose_outputs_were_compared(
    merged: tuple[Any, pl.Trainer, LoRACallback, Path],
) -> None:
    file = io.StringIO()
    Console(file=file, width=200).print(merged[2].merge_report)
    assert "outputs of the live module, in its own dtype, on a batch" in file.getvalue()
