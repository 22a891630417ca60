"""Wrong configurations and damaged, truncated, swapped or hostile files: an error of our own, and nothing is lost.

Every file is tried on all three ways in: ``fit(ckpt_path=...)``, ``test(ckpt_path=...)`` and ``load_from_checkpoint``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_lora import (
    AdapterMismatchError,
    BaseMismatchError,
    CheckpointError,
    LightningLoRAError,
    LoRACallback,
    LoRAConfig,
    MergeConfig,
    MergeError,
    TargetNotFoundError,
    UnsupportedSetupError,
    inject_adapters,
    load_from_checkpoint,
    merge_adapters,
)
from lightning_lora.adapter import Adapter
from lightning_lora.checkpoint_file import read_checkpoint
from tests.conftest import TinyModule, make_loader

CONFIG = LoRAConfig(rank=2, alpha=4)
A0, A3 = "backbone.0.adapters.default.lora_A", "backbone.3.adapters.default.lora_A"
WAYS = ("fit", "test", "load_from_checkpoint")


def trainer(root: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options}, default_root_dir=root, callbacks=list(callbacks))


def fit(run: pl.Trainer, module: pl.LightningModule, width: int = 16, **options: Any) -> None:
    run.fit(module, make_loader(width=width), make_loader(width=width), **options)


def lora(config: LoRAConfig = CONFIG, **options: Any) -> LoRACallback:
    return LoRACallback(config, print_report=False, **options)


def other_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> TinyModule:
    """The same network, trained by something else than AdamW."""

    class Other(TinyModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return kind(self.parameters(), lr=1e-3, **options)

    return Other()


class TwoOptimizers(TinyModule):
    """The same network with manual optimization and an optimizer for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.backbone[index].parameters(), lr=1e-3) for index in (0, 3)]


class Payload:
    """Unpickling this runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


class Files:
    """Makes checkpoints, right and wrong ones. The right ones are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "the payload ran"
        self.good = self.run("good.ckpt", TinyModule())
        self.weights = self.run("weights.ckpt", TinyModule(), weights_only=True)

    def run(
        self,
        name: str,
        module: pl.LightningModule,
        config: LoRAConfig | None = CONFIG,
        width: int = 16,
        *,
        weights_only: bool = False,
    ) -> Path:
        path = self.folder / name
        callbacks = [lora(config)] if config else []
        run = trainer(self.folder, *callbacks)
        fit(run, module, width)
        run.save_checkpoint(path, weights_only=weights_only)
        return path

    def merged(self) -> Path:
        config = MergeConfig(output_dir=str(self.folder / "merged"))
        fit(trainer(self.folder, lora(merge_on_fit_end=config)), TinyModule())
        return self.folder / "merged" / "merged.ckpt"

    def edited(self, path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
        checkpoint = torch.load(self.good, weights_only=True)
        edit(checkpoint)
        torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@dataclass
class Case:
    """One bad file: how it is made, and what is said of it."""

    make: Callable[[Files, Path], object]
    error: type[LightningLoRAError]
    words: str
    ways: tuple[str, ...] = WAYS
    loads: bool = False  # whether the adapters are right and in the module when something else is refused


def cut(share: float) -> Callable[[Files, Path], object]:
    def make(files: Files, path: Path) -> None:
        content = files.good.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return make


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Files, Path], object]:
    return lambda files, path: files.edited(path, change)


def manifest(**values: Any) -> Callable[[Files, Path], object]:
    return edit(lambda checkpoint: checkpoint["lightning_lora"].update(values))


def tensors(**values: Any) -> Callable[[Files, Path], object]:
    return edit(lambda checkpoint: checkpoint["state_dict"].update(values))


def trained(
    config: LoRAConfig | None = CONFIG, module: Callable[[], pl.LightningModule] = TinyModule, width: int = 16
) -> Callable[[Files, Path], object]:
    return lambda files, path: files.run(path.name, module(), config, width).rename(path)


def flip(part: str) -> Callable[[Files, Path], object]:
    """Change one bit in the middle of the longest entry of the archive whose name has ``part`` in it."""

    def make(files: Files, path: Path) -> None:
        content = bytearray(files.good.read_bytes())
        with zipfile.ZipFile(files.good) as archive:
            entry = max((e for e in archive.infolist() if part in e.filename), key=lambda e: e.file_size)
            data = archive.read(entry)
        content[bytes(content).index(data) + len(data) // 2] ^= 1
        path.write_bytes(content)

    return make


def other_zip(files: Files, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


CUT, OBJECTS = (
    r"bad\.ckpt can't be opened: it is cut off or damaged",
    r"bad\.ckpt can't be opened: it holds Python objects",
)
NO_CHECKPOINT = r"bad\.ckpt is no Lightning checkpoint: it has no 'state_dict'"
PLAIN = r"holds no lightning_lora adapters: it was saved without LoRACallback.*fit without ckpt_path"
CHECKSUM = r"bad\.ckpt is damaged: the checksum of .* is wrong"
NOT_LOADING = ("fit", "test")  # load_from_checkpoint builds whatever the file was trained with

CASES: dict[str, Case] = {
    **{f"cut off after {tenth} tenths": Case(cut(tenth / 10 + 0.05), CheckpointError, CUT) for tenth in range(10)},
    "cut off by one byte": Case(
        lambda files, path: path.write_bytes(files.good.read_bytes()[:-1]), CheckpointError, CUT
    ),
    "empty": Case(lambda files, path: path.write_bytes(b""), CheckpointError, CUT),
    "zeros": Case(lambda files, path: path.write_bytes(bytes(5000)), CheckpointError, CUT),
    "random bytes": Case(
        lambda files, path: path.write_bytes(random.Random(0).randbytes(5000)), CheckpointError, OBJECTS
    ),
    "text": Case(lambda files, path: path.write_text("state_dict: {}\n"), CheckpointError, "can't be opened"),
    "zip of something else": Case(other_zip, CheckpointError, CUT),
    "one bit flipped in a tensor": Case(flip("/data/"), CheckpointError, CHECKSUM),
    "folder": Case(lambda files, path: path.mkdir(), CheckpointError, r"bad\.ckpt is a folder, not a checkpoint"),
    "missing path": Case(lambda files, path: None, CheckpointError, r"There is no checkpoint at .*bad\.ckpt"),
    "hostile torch file": Case(
        lambda files, path: torch.save({"state_dict": {}, "x": Payload(files.marker)}, path), CheckpointError, OBJECTS
    ),
    "hostile pickle": Case(
        lambda files, path: path.write_bytes(pickle.dumps(Payload(files.marker), protocol=2)), CheckpointError, OBJECTS
    ),
    "hostile hyper-parameter in a good file": Case(
        lambda files, path: files.edited(path, lambda c: c["hyper_parameters"].update(width=Payload(files.marker))),
        CheckpointError,
        OBJECTS,
    ),
    "list": Case(lambda files, path: torch.save([1], path), CheckpointError, NO_CHECKPOINT),
    "bare state dict": Case(
        lambda files, path: torch.save(TinyModule().state_dict(), path), CheckpointError, NO_CHECKPOINT
    ),
    "state dict removed": Case(edit(lambda c: c.pop("state_dict")), CheckpointError, NO_CHECKPOINT),
    "state dict a list": Case(edit(lambda c: c.update(state_dict=[1])), CheckpointError, NO_CHECKPOINT),
    "state dict with numbers as names": Case(
        edit(lambda c: c["state_dict"].update({1: torch.zeros(2)})), CheckpointError, r"its 'state_dict' is not usable"
    ),
    **{
        f"{entry} = {value!r}": Case(
            edit(lambda c, entry=entry, value=value: c.update({entry: value})),  # type: ignore[misc]
            CheckpointError,
            rf"bad\.ckpt is damaged: its '{entry}' is not usable\. Use another checkpoint",
        )
        for entry, values in {
            "pytorch-lightning_version": (None, "x", 3),
            "loops": (None, {}, "x", [1]),
            "callbacks": ("x", 3),
            "hyper_parameters": (None, "x"),
            "optimizer_states": (None, 3, [None], [{"state": {}}], [{"state": {}, "param_groups": [{"params": 3}]}]),
            "lr_schedulers": (None, "x", [1]),
        }.items()
        for value in values
    },
    "plain checkpoint": Case(trained(None), CheckpointError, PLAIN),
    "merged checkpoint": Case(lambda files, path: shutil.copy(files.merged(), path), CheckpointError, PLAIN),
    "manifest removed": Case(edit(lambda c: c.pop("lightning_lora")), CheckpointError, PLAIN),
    "manifest None": Case(edit(lambda c: c.update(lightning_lora=None)), CheckpointError, PLAIN),
    "manifest a list": Case(edit(lambda c: c.update(lightning_lora=[1])), CheckpointError, "has no format number"),
    **{
        f"format {value!r}": Case(manifest(format=value), CheckpointError, "manifest .* is damaged: it has no format")
        for value in (None, "1", 0, True, 1.0)
    },
    "newer format": Case(
        manifest(format=99, version="7.0"),
        CheckpointError,
        r"has format 99 \(lightning_lora 7\.0\); this version reads up to 1\. Upgrade",
    ),
    **{
        f"manifest's {part} = {value!r}": Case(
            manifest(**{part: value}), CheckpointError, rf"manifest .* is damaged: {part}\. Use another checkpoint"
        )
        for part, values in {
            "configs": (None, [], {}, {"default": 3}),
            "layers": (None, [1]),
            "adapters": (None, [1], "x"),
            "saved": (None, [[1]]),
            "active": (None, {}, {"backbone.0": ["default"]}, {"backbone.0": ["x"], "backbone.3": ["x"]}),
            "buffers": ({}, [[1]]),
            "base_buffers": (None, {}, {"tensors": {"a": ["float32", 1]}, "samples": torch.zeros(0)}),
            "base": (None, {}, {"tensors": {}}, {"tensors": {"a": 3}, "samples": torch.zeros(8)}),
            "hyper_parameters": (None, "x", {"left_out": 3}, {"omegaconf": [["x"]]}),
            "optimizers": (3, [1]),
        }.items()
        for value in values
    },
    **{
        f"manifest's config = {config}": Case(
            manifest(configs={name: config}), error, words, ways=("load_from_checkpoint",)
        )
        for name, config, error, words in [
            ("default", {}, CheckpointError, r"adapters of kind None; this version knows lora"),
            ("default", {"kind": "sorcery"}, CheckpointError, r"adapters of kind 'sorcery'; this version knows lora"),
            ("default", {"kind": "lora", "rank": "x"}, CheckpointError, r"config in the file is damaged: rank must be"),
            ("default", {"kind": "lora", "r": 2}, CheckpointError, r"config in the file is damaged: .*'r'"),
            ("two words", {"kind": "lora"}, AdapterMismatchError, r"do not fit TinyModule: .*'two words' must be"),
            ("default", {"kind": "lora", "layers": [9]}, AdapterMismatchError, r"do not fit TinyModule: .* entry 9"),
        ]
    },
    "random state damaged": Case(
        manifest(random_state={"torch": torch.zeros(3)}), CheckpointError, r"random state .* is damaged", ("fit",), True
    ),
    "adapter missing": Case(
        edit(lambda c: c["state_dict"].pop(A0)), AdapterMismatchError, rf"missing from the file: {A0}\. Use the config"
    ),
    "adapter too many": Case(
        tensors(**{"backbone.0.adapters.other.lora_A": torch.zeros(2, 16)}),
        AdapterMismatchError,
        r"in the file, but not trained by this configuration: backbone\.0\.adapters\.other\.lora_A",
    ),
    "frozen tensor smuggled in": Case(
        tensors(**{"backbone.0.weight": torch.zeros(16, 16)}),
        AdapterMismatchError,
        r"in the file, but not trained by this configuration: backbone\.0\.weight",
    ),
    **{
        f"adapter of a wrong form ({said})": Case(
            tensors(**{A0: value}), AdapterMismatchError, rf"{A0} is {said}.* in the file and \(2, 16\) here"
        )
        for value, said in [
            (torch.zeros(3, 16), r"\(3, 16\)"),
            (torch.zeros(16, 2), r"\(16, 2\)"),
            (torch.zeros(32), r"\(32,\)"),
            (torch.zeros(2, 16, dtype=torch.int64), "integer"),
            (torch.zeros(2, 16, dtype=torch.complex64), "complex"),
            (torch.zeros(2, 16, device="meta"), "meta"),
            (torch.zeros(2, 16).to_sparse(), "torch.sparse_coo"),
            ("x", "str"),
            (None, "NoneType"),
        ]
    },
    "other rank": Case(
        trained(LoRAConfig(rank=3, alpha=6)), AdapterMismatchError, rf"{A0} is \(3, 16\) in the file", NOT_LOADING
    ),
    "other alpha": Case(
        trained(LoRAConfig(rank=2, alpha=8)),
        AdapterMismatchError,
        r"\[rank, alpha, scaling\] of 2 layers differ, such as backbone\.0: .*8\.0.* Use the alpha",
        NOT_LOADING,
    ),
    "rank-stabilised scaling": Case(
        trained(LoRAConfig(rank=2, alpha=4, rank_stabilized=True)),
        AdapterMismatchError,
        r"\[rank, alpha, scaling\] of 2 layers differ",
        NOT_LOADING,
    ),
    "fewer targets": Case(
        trained(LoRAConfig(rank=2, alpha=4, target_modules="backbone.0")),
        AdapterMismatchError,
        rf"missing from the file: {A3}",
        NOT_LOADING,
    ),
    "more targets": Case(
        trained(LoRAConfig(rank=2, alpha=4, target_modules=["all-linear", "head"])),
        AdapterMismatchError,
        r"in the file, but not trained by this configuration: head\.adapters",
        NOT_LOADING,
    ),
    "a module trained in full": Case(
        trained(LoRAConfig(rank=2, alpha=4, modules_to_save="head")),
        AdapterMismatchError,
        r"not trained by this configuration: head\.bias, head\.weight.*modules_to_save",
        NOT_LOADING,
    ),
    "other base": Case(
        trained(module=lambda: TinyModule(seed=5)),
        BaseMismatchError,
        r"trained on another base: the values of 6 of 6 parameters differ: backbone\.0\.weight",
        NOT_LOADING,
    ),
    "other base, said to be this one": Case(
        lambda files, path: relabelled(files, path), BaseMismatchError, r"trained on another base"
    ),
    "other width": Case(
        trained(module=lambda: TinyModule(width=8), width=8),
        AdapterMismatchError,
        r"is \(2, 8\) in the file and \(2, 16\) here",
        NOT_LOADING,
    ),
    **{
        f"optimizer state of {kind.__name__}": Case(
            trained(module=lambda kind=kind, options=options: other_optimizer(kind, **options)),  # type: ignore[misc]
            AdapterMismatchError,
            rf"optimizer state in the checkpoint is of {kind.__name__}, the optimizer here is AdamW\. Resume with",
            ("fit",),
            True,
        )
        for kind, options in [
            (torch.optim.SGD, {"momentum": 0.9}),
            (torch.optim.Adagrad, {}),
            (torch.optim.Adamax, {}),
            (torch.optim.Adam, {}),
        ]
    },
    "state of two optimizers": Case(
        trained(module=TwoOptimizers),
        AdapterMismatchError,
        r"state of 2 optimizers, the module configures 1",
        ("fit",),
        True,
    ),
    "state of an optimizer with other groups": Case(
        trained(module=lambda: TinyModule(optimizer="groups")),
        AdapterMismatchError,
        r"belongs to \[4, 0\] parameters by group, the optimizer here holds \[4\]",
        ("fit",),
        True,
    ),
    "weights only": Case(
        lambda files, path: shutil.copy(files.weights, path),
        CheckpointError,
        r"holds only weights .*can't be resumed .*load_from_checkpoint",
        ("fit",),
        True,
    ),
}


def relabelled(files: Files, path: Path) -> None:
    """A checkpoint of another base whose hyper-parameters say that it is of this one."""
    source = files.run("other seed.ckpt", TinyModule(seed=5))
    checkpoint = torch.load(source, weights_only=True)
    checkpoint["hyper_parameters"]["seed"] = 0
    torch.save(checkpoint, path)


def attempt(way: str, root: Path, path: Path, module: TinyModule) -> TinyModule:
    if way == "fit":
        fit(trainer(root, lora(), max_epochs=2), module, ckpt_path=path)
    elif way == "test":
        trainer(root, lora()).test(module, make_loader(), ckpt_path=path, verbose=False)
    else:
        module = load_from_checkpoint(TinyModule, path)
    return module


def content(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def state(module: nn.Module, *, adapters: bool) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if ("lora_" in key) == adapters}


@pytest.mark.parametrize(("way", "name"), [(way, name) for name, case in CASES.items() for way in case.ways])
def test_a_bad_file_is_refused_and_nothing_is_lost(way: str, name: str, files: Files, tmp_path: Path) -> None:
    case, path, module = CASES[name], tmp_path / "bad.ckpt", TinyModule()
    case.make(files, path)
    before, base = content(path), state(module, adapters=False)
    fresh = TinyModule()
    inject_adapters(fresh, CONFIG)

    with pytest.raises(case.error, match=f"(?s){case.words}") as caught:
        attempt(way, tmp_path / "root", path, module)

    assert type(caught.value) is case.error
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert not files.marker.exists()
    assert content(path) == before
    assert [file.name for file in tmp_path.iterdir()] in ([], ["bad.ckpt"])
    after = state(module, adapters=False)
    assert all(torch.equal(after[key], value) for key, value in base.items())
    if not case.loads:
        untouched = state(fresh, adapters=True)
        assert all(torch.equal(value, untouched[key]) for key, value in state(module, adapters=True).items())

    right = attempt(way, tmp_path / "root", files.good, module)
    wanted = torch.load(files.good, weights_only=True)["state_dict"]
    got = state(right, adapters=True)
    assert set(got) == set(wanted)
    if way != "fit":
        assert all(torch.equal(got[key], value) for key, value in wanted.items())
    else:
        assert right.trainer.global_step == 4


def test_the_bad_files_are_at_least_as_many_as_promised() -> None:
    assert len(CASES) >= 25


def test_adapters_of_two_layers_exchanged_by_hand_are_not_noticed(files: Files, tmp_path: Path) -> None:
    """The honest limit: a file whose author changed it on purpose, checksums included, is what it says it is."""

    def exchange(checkpoint: dict[str, Any]) -> None:
        tensors = checkpoint["state_dict"]
        tensors[A0], tensors[A3] = tensors[A3], tensors[A0]

    files.edited(tmp_path / "exchanged.ckpt", exchange)
    module = load_from_checkpoint(TinyModule, tmp_path / "exchanged.ckpt")
    assert torch.equal(module.state_dict()[A0], torch.load(files.good, weights_only=True)["state_dict"][A3])


def test_a_bit_flipped_in_the_optimizer_state_is_noticed_too(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    parts = zipfile.ZipFile(files.good).infolist()
    noticed = 0
    for part in [info.filename for info in parts if "/data/" in info.filename and info.file_size]:
        flip(part)(files, path)
        with pytest.raises(CheckpointError, match="checksum of"):
            read_checkpoint(path)
        noticed += 1
    assert noticed > 8  # four adapter tensors and two moments of each


@pytest.mark.parametrize("way", ["fit", "test"])
def test_a_bad_file_does_not_touch_adapters_trained_before(way: str, files: Files, tmp_path: Path) -> None:
    module = TinyModule()
    fit(trainer(tmp_path, lora()), module)
    before = state(module, adapters=True)
    flip("/data/")(files, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError):
        attempt(way, tmp_path, tmp_path / "bad.ckpt", module)
    after = state(module, adapters=True)
    assert all(torch.equal(after[key], value) for key, value in before.items())


WRONG_CONFIGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target_modules": "q_proj"}, TargetNotFoundError, r"'q_proj' matches no module of TinyModule"),
    ({"target_modules": ["backbone.0", "haed"]}, TargetNotFoundError, r"'haed' matches no module.*Closest: 'head'"),
    ({"target_modules": "attention"}, TargetNotFoundError, r"target_modules='attention' selects no layer of Tiny"),
    ({"target_modules": "backbone.1"}, TargetNotFoundError, r"'backbone\.1' of type ReLU, which cannot carry"),
    ({"target_modules": "backbone"}, TargetNotFoundError, r"Name the layers inside it, such as 'backbone\.0'"),
    ({"target_modules": "backbone.(0"}, ValueError, r"'backbone\.\(0' is not a valid regular expression"),
    ({"exclude_modules": "nothing"}, TargetNotFoundError, r"exclude_modules: 'nothing' matches no module"),
    ({"exclude_modules": ["backbone"]}, TargetNotFoundError, r"Not adapted: .*excluded by 'backbone'"),
    ({"modules_to_save": "heat"}, TargetNotFoundError, r"modules_to_save: 'heat' matches no module.*'head'"),
    ({"rank_pattern": {"head": 2}}, TargetNotFoundError, r"rank_pattern: 'head' matches no adapted layer"),
    ({"alpha_pattern": {"x": 2}}, TargetNotFoundError, r"alpha_pattern: 'x' matches no adapted layer"),
    ({"layers": 4}, ValueError, r"layers entry 4 selects no target layer; there is backbone with 4 blocks"),
    ({"layers": "0-7"}, ValueError, r"layers entry '0-7' goes past the last block, which is number 3"),
    ({"layers": "odd"}, ValueError, r"layers entry 'odd' is not understood: use an index"),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG_CONFIGS, ids=[str(c[0]) for c in WRONG_CONFIGS])
@pytest.mark.parametrize("way", ["fit", "validate", "inject_adapters"])
def test_a_wrong_configuration_is_refused_and_a_right_one_works_afterwards(
    way: str, options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    module = TinyModule()
    before = state(module, adapters=False)

    def run(config: LoRAConfig) -> None:
        if way == "inject_adapters":
            inject_adapters(module, config)
        elif way == "fit":
            fit(trainer(tmp_path, lora(config)), module)
        else:
            trainer(tmp_path, lora(config)).validate(module, make_loader(), verbose=False)

    with pytest.raises(error, match=words):
        run(LoRAConfig(**{"rank": 2, **options}))
    after = state(module, adapters=False)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert list(tmp_path.iterdir()) == []
    run(LoRAConfig(rank=2))
    assert len(state(module, adapters=True)) == 4


WRONG_TRAINERS: list[tuple[str, Callable[[], list[pl.Callback]], str]] = [
    ("the callback twice", lambda: [lora(), lora()], r"more than one LoRACallback: pass one"),
    (
        "an averaging callback before ours",
        lambda: [StochasticWeightAveraging(1e-2), lora()],
        r"StochasticWeightAveraging copies the module .* list LoRACallback before it",
    ),
    (
        "a merge of the best without a best",
        lambda: [lora(merge_on_fit_end=MergeConfig(source="best"))],
        r'MergeConfig\(source="best"\) needs a ModelCheckpoint\(monitor=...\)',
    ),
    (
        "a merge into a file",
        lambda: [lora(merge_on_fit_end=MergeConfig(output_dir=f"{__file__}/merged"))],
        r"MergeConfig\.output_dir: .*test_bad_input\.py is a file",
    ),
]


@pytest.mark.parametrize(("callbacks", "words"), [w[1:] for w in WRONG_TRAINERS], ids=[w[0] for w in WRONG_TRAINERS])
def test_a_wrong_arrangement_is_refused_before_anything_trains(
    callbacks: Callable[[], list[pl.Callback]], words: str, tmp_path: Path
) -> None:
    module = TinyModule()
    before = state(module, adapters=False)
    with pytest.raises(UnsupportedSetupError, match=words):
        fit(trainer(tmp_path, *callbacks()), module)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    fit(trainer(tmp_path, lora()), module)
    assert len(state(module, adapters=True)) == 4


def spoil(module: nn.Module, value: float) -> None:
    adapter = next(child for child in module.modules() if isinstance(child, Adapter))
    with torch.no_grad():
        adapter.get_parameter("lora_B")[0, 0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_diverged_are_not_merged(value: float) -> None:
    module = TinyModule()
    inject_adapters(module, CONFIG)
    spoil(module, value)
    before = module.state_dict()
    with pytest.raises(MergeError, match=r"merged weight of 'backbone\.0' is not finite: its adapter diverged"):
        merge_adapters(module)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, after[k]) for k, v in before.items() if torch.isfinite(v).all())
    spoil(module, 1.0)
    merge_adapters(module)


class Diverging(TinyModule):
    """Its last step makes an adapter NaN."""

    def on_train_end(self) -> None:
        spoil(self, float("nan"))


def test_a_run_that_diverged_keeps_its_checkpoints_and_writes_no_artifact(tmp_path: Path) -> None:
    module = Diverging()
    saving = ModelCheckpoint(tmp_path / "checkpoints", filename="kept")
    merge = MergeConfig(output_dir=str(tmp_path / "merged"))
    with pytest.raises(MergeError, match=r"not finite.*Merge an earlier checkpoint"):
        fit(trainer(tmp_path, lora(merge_on_fit_end=merge), saving), module)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]
    restored = load_from_checkpoint(Diverging, tmp_path / "checkpoints" / "kept.ckpt")
    assert all(torch.isfinite(value).all() for value in restored.state_dict().values())
    merge_adapters(restored)
