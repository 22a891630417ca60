"""Hazard: torch.compile puts a wrapper into names and keys, before the injection or after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    inject_adapters,
    load_from_checkpoint,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import adapters_of, read, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


class Compiled(TinyModule):
    """Compiles a submodule at a moment of the user's choice."""

    when = "init"
    backend = "eager"
    norm = False

    def build(self) -> None:
        super().build()
        if self.norm:
            self.backbone.append(nn.BatchNorm1d(WIDTH))
        self.compile_at("init")

    def compile_at(self, here: str) -> None:
        if here == self.when and not hasattr(self.backbone, "_orig_mod"):
            self.backbone = torch.compile(self.backbone, backend=self.backend)

    def setup(self, stage: str) -> None:
        self.compile_at("setup")

    def configure_model(self) -> None:
        self.compile_at("configure_model")

    def on_fit_start(self) -> None:
        self.compile_at("on_fit_start")


class Never(Compiled):
    when = "never"


class InSetup(Compiled):
    when = "setup"


class InConfigureModel(Compiled):
    when = "configure_model"


class InFitStart(Compiled):
    when = "on_fit_start"


class WithNorm(InSetup):
    norm = True


class AheadOfTime(InSetup):
    backend = "aot_eager"


MOMENTS = [Compiled, InSetup, InConfigureModel, InFitStart]
KEYS = {f"backbone.{index}.adapters.default.lora_{part}" for index in (0, 3) for part in "AB"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fitted(make_trainer: Any, folder: Path, module: TinyModule, epochs: int = 1, **options: Any) -> tuple[str, Any]:
    saver = ModelCheckpoint(dirpath=folder)
    trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[lora(**options), saver])
    fit(trainer, module)
    return saver.best_model_path, trainer


@pytest.mark.parametrize("cls", [Compiled, InFitStart, AheadOfTime])
def test_a_compiled_submodule_trains_as_the_eager_one_and_its_file_has_clean_keys(
    make_trainer: Any, tmp_path: Path, cls: Any
) -> None:
    eager, module = Never(), cls()
    fitted(make_trainer, tmp_path / "eager", eager)
    path, _ = fitted(make_trainer, tmp_path / "compiled", module)
    assert trained(module)
    assert set(read(path)["state_dict"]) == KEYS
    for key, value in adapters_of(eager).items():
        compiled = module.state_dict()[key.replace("backbone.", "backbone._orig_mod.")]
        torch.testing.assert_close(compiled, value)


@pytest.mark.parametrize(
    ("saved", "loaded"), [*((Never, cls) for cls in MOMENTS), (Compiled, Never), (InFitStart, Never)]
)
def test_files_go_from_compiled_to_eager_modules_and_back(
    make_trainer: Any, tmp_path: Path, saved: Any, loaded: Any
) -> None:
    path, trainer = fitted(make_trainer, tmp_path, saved())
    score = metric(trainer.test(trainer.lightning_module, make_loader(), verbose=False))
    module = loaded()
    tester = make_trainer(callbacks=[lora()])
    assert metric(tester.test(module, make_loader(), ckpt_path=path, verbose=False)) == pytest.approx(score, rel=1e-5)
    resumed = loaded()
    again = make_trainer(max_epochs=2, callbacks=[lora()])
    fit(again, resumed, ckpt_path=path)
    assert again.global_step == 4


def test_load_from_checkpoint_of_a_module_that_compiles_itself(make_trainer: Any, tmp_path: Path) -> None:
    path, _ = fitted(make_trainer, tmp_path, Never())
    twin = load_from_checkpoint(Compiled, path)
    assert set(read(path)["state_dict"]) == KEYS
    assert trained(twin)


@pytest.mark.parametrize("cls", [Compiled, InSetup, InFitStart])
def test_a_module_trained_in_full_beside_a_compiled_one(make_trainer: Any, tmp_path: Path, cls: Any) -> None:
    module = cls()
    path, trainer = fitted(make_trainer, tmp_path, module, modules_to_save=["backbone.3"])
    assert set(read(path)["state_dict"]) >= {"backbone.3.weight", "backbone.3.bias"}
    score = metric(trainer.test(module, make_loader(), verbose=False))
    tester = make_trainer(callbacks=[lora(modules_to_save=["backbone.3"])])
    assert metric(tester.test(cls(), make_loader(), ckpt_path=path, verbose=False)) == pytest.approx(score, rel=1e-5)


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_frozen_statistics_inside_a_compiled_module_stay_out_of_the_file(make_trainer: Any, tmp_path: Path) -> None:
    module = WithNorm()
    path, _ = fitted(make_trainer, tmp_path, module)
    assert is_adapter_only(path)


@pytest.mark.parametrize("cls", [Compiled, InFitStart])
def test_after_a_merge_a_compiled_module_is_plain_again_and_thawed(make_trainer: Any, tmp_path: Path, cls: Any) -> None:
    module = cls()
    x = torch.randn(3, WIDTH)
    start = module.eval()(x)
    _, trainer = fitted(make_trainer, tmp_path, module.train(), merge=True)
    assert type(module.backbone._orig_mod[0]) is nn.Linear
    assert all(p.requires_grad for p in module.parameters())
    assert not torch.equal(module.eval()(x), start)
    trainer.test(module, make_loader(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_removal_restores_a_module_compiled_before_or_after(compiled_first: bool) -> None:
    module = Never()
    original = {key: value.clone() for key, value in module.state_dict().items()}
    if compiled_first:
        module.backbone = torch.compile(module.backbone, backend="eager")
    inject_adapters(module, LoRAConfig(rank=2, modules_to_save=["backbone.3"]))
    if not compiled_first:
        module.backbone = torch.compile(module.backbone, backend="eager")
    with torch.no_grad():
        module.backbone._orig_mod[3].weight.add_(1.0)
    remove_adapters(module)
    assert all(p.requires_grad for p in module.parameters())
    module.backbone = module.backbone._orig_mod
    assert same(module.state_dict(), original)


def test_a_submodule_that_ran_compiled_before_the_injection_sees_its_adapters() -> None:
    net = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), backend="eager")
    x = torch.randn(3, WIDTH)
    before = net(x)
    inject_adapters(net, LoRAConfig(rank=2))
    assert torch.equal(net(x), before)
    nn.init.ones_(net._orig_mod[0].adapters["default"].lora_B)
    assert not torch.allclose(net(x), before)
    remove_adapters(net)
    assert torch.equal(net(x), before)


def test_patterns_see_names_without_the_wrapper() -> None:
    report = inject_adapters(Compiled(), LoRAConfig(rank=2, target_modules=[r"^backbone\.0$", "backbone.3"]))
    assert len(report.layers) == 2


def test_the_start_of_an_adapter_does_not_depend_on_compilation() -> None:
    eager, compiled = Never(), Compiled()
    for module in (eager, compiled):
        inject_adapters(module, LoRAConfig(rank=2))
    assert all(
        torch.equal(a, b) for a, b in zip(adapters_of(eager).values(), adapters_of(compiled).values(), strict=True)
    )


# What the compiler itself asks of an input that is no leaf, when warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("part", ["the whole", "one layer"])
@pytest.mark.parametrize("first", ["compiled first", "adapted first"])
def test_a_module_compiled_in_place_sees_its_adapters_and_keeps_its_keys(part: str, first: str) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    keys = set(net.state_dict())
    x = torch.randn(3, WIDTH)
    before = net(x)
    steps = [
        lambda: (net if part == "the whole" else net[0]).compile(backend="eager"),
        lambda: inject_adapters(net, LoRAConfig(rank=2)),
    ]
    for step in steps if first == "compiled first" else steps[::-1]:
        step()
        torch.testing.assert_close(net(x), before)
    nn.init.ones_(net[0].adapters["default"].lora_B)
    adapted = net(x)
    assert not torch.allclose(adapted, before)
    merge_adapters(net)
    torch.testing.assert_close(net(x), adapted)
    assert set(net.state_dict()) == keys
    unmerge_adapters(net)
    torch.testing.assert_close(net(x), adapted)
    remove_adapters(net)
    torch.testing.assert_close(net(x), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("merge", [False, True])
def test_a_module_compiled_in_place_without_graph_breaks_trains_with_a_merge_at_the_end(
    make_trainer: Any, tmp_path: Path, merge: bool
) -> None:
    class Whole(Never):
        """Its steps call the compiled part, and never the root."""

        def configure_model(self) -> None:
            self.backbone.compile(backend="eager", fullgraph=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    module = Whole()
    _, trainer = fitted(make_trainer, tmp_path, module, merge=merge)
    assert type(module.backbone[0]) is nn.Linear or not merge
    trainer.test(module, make_loader(), ckpt_path="best", verbose=False)
