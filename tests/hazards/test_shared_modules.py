"""Hazard: one module or one tensor under two names: adapted once, saved under both, trained and merged as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters, remove_adapters, unmerge_adapters
from tests.conftest import WIDTH, TinyModule, make_loader
from tests.hazards.runs import fit, is_adapter_only, lora, metric, trained
from tests.states import adapters_of, base_of, read, same

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


class Shared(TinyModule):
    """The same block twice, and the same head under a second name."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
            self.blocks = nn.ModuleList([block, block])
            self.head = nn.Linear(WIDTH, 1)
            self.tail = self.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


class TiedHead(TinyModule):
    """A head whose weight is the embedding's."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.body = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)
            self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)).mean(1, keepdim=True)


def fitted(make_trainer: Any, folder: Path, module: TinyModule, **options: Any) -> tuple[str, Any]:
    saver = ModelCheckpoint(dirpath=folder)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[lora(**options), saver])
    fit(trainer, module)
    return saver.best_model_path, trainer


def test_a_module_under_two_names_is_adapted_once() -> None:
    report = inject_adapters(Shared(), LoRAConfig(rank=2))
    assert [row.name for row in report.layers] == ["blocks.0.0"]
    assert report.trainable_parameters == 2 * (WIDTH + WIDTH)


@pytest.mark.parametrize("name", ["blocks.0.0", "blocks.1.0", "head", "tail"])
def test_a_module_under_two_names_is_found_by_either(name: str) -> None:
    assert len(inject_adapters(Shared(), LoRAConfig(rank=2, target_modules=[name])).layers) == 1


def test_both_uses_of_a_shared_module_go_through_its_adapter() -> None:
    net = Shared()
    inject_adapters(net, LoRAConfig(rank=2))
    x = torch.randn(3, WIDTH)
    before = [net.blocks[0](x), net.blocks[1](x)]
    nn.init.ones_(net.blocks[1][0].adapters["default"].lora_B)
    assert not torch.equal(net.blocks[0](x), before[0])
    assert torch.equal(net.blocks[0](x), net.blocks[1](x))


def test_a_shared_module_is_saved_under_both_names_and_resumes_bitwise(make_trainer: Any, tmp_path: Path) -> None:
    whole = Shared()
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), whole)
    path, _ = fitted(make_trainer, tmp_path, Shared())
    assert is_adapter_only(path)
    assert {key.partition(".adapters")[0] for key in read(path)["state_dict"]} == {"blocks.0.0", "blocks.1.0"}
    resumed = Shared()
    fit(make_trainer(max_epochs=2, callbacks=[lora()]), resumed, ckpt_path=path)
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_shared_module_merges_and_unmerges_as_one() -> None:
    net = Shared()
    original = base_of(net)
    inject_adapters(net, LoRAConfig(rank=2))
    nn.init.normal_(net.blocks[0][0].adapters["default"].lora_B)
    x = torch.randn(3, WIDTH)
    adapted, live = net(x), adapters_of(net)
    assert len(merge_adapters(net).layers) == 1
    torch.testing.assert_close(net(x), adapted)
    assert net.blocks[0] is net.blocks[1]
    unmerge_adapters(net)
    assert same(adapters_of(net), live)
    remove_adapters(net)
    assert same(net.state_dict(), original)


def test_a_merged_shared_module_has_both_keys_in_its_file(make_trainer: Any, tmp_path: Path) -> None:
    module, callback = Shared(), lora(merge=True)
    fit(make_trainer(callbacks=[callback]), module)
    again = Shared.load_from_checkpoint(Path(callback.merge_report.folder) / "merged.ckpt")
    assert same(again.state_dict(), module.state_dict())


@pytest.mark.parametrize("name", ["head", "tail"])
def test_a_shared_module_trained_in_full_is_saved_and_restored_by_either_name(
    make_trainer: Any, tmp_path: Path, name: str
) -> None:
    module = Shared()
    start = module.head.weight.detach().clone()
    path, trainer = fitted(make_trainer, tmp_path, module, modules_to_save=[name])
    assert not torch.equal(module.head.weight, start)
    score = metric(trainer.test(module, make_loader(), verbose=False))
    fresh = Shared()
    tester = make_trainer(callbacks=[lora(modules_to_save=[name])])
    assert metric(tester.test(fresh, make_loader(), ckpt_path=path, verbose=False)) == score
    assert torch.equal(fresh.tail.weight, module.tail.weight)


@pytest.mark.parametrize("name", ["out", "embedding"])
def test_a_tied_weight_trained_in_full_is_saved_and_restored_by_either_name(
    make_trainer: Any, tmp_path: Path, name: str
) -> None:
    module = TiedHead()
    start = module.out.weight.detach().clone()
    path, trainer = fitted(make_trainer, tmp_path, module, modules_to_save=[name])
    assert not torch.equal(module.out.weight, start)
    score = metric(trainer.test(module, make_loader(), verbose=False))
    fresh = TiedHead()
    tester = make_trainer(callbacks=[lora(modules_to_save=[name])])
    assert metric(tester.test(fresh, make_loader(), ckpt_path=path, verbose=False)) == score
    assert fresh.out.weight is fresh.embedding.weight
    remove_adapters(fresh)
    assert torch.equal(fresh.out.weight, start)


def test_a_tied_pair_beside_adapters_stays_tied_and_frozen_through_a_run(make_trainer: Any, tmp_path: Path) -> None:
    module = TiedHead()
    start = module.out.weight.detach().clone()
    path, _ = fitted(make_trainer, tmp_path, module, merge=True)
    assert is_adapter_only(path)
    assert module.out.weight is module.embedding.weight
    assert torch.equal(module.out.weight, start)


def test_a_module_held_by_another_module_too_is_no_second_copy(make_trainer: Any) -> None:
    class Holder(TinyModule):
        def build(self) -> None:
            super().build()
            self.view = nn.ModuleDict({"first": self.backbone[0]})

    module = Holder()
    fit(make_trainer(callbacks=[lora()]), module)
    assert trained(module)
    assert module.view["first"] is module.backbone[0]
