"""The frozen base stays as it is: norm statistics, and no fused path around the adapters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    disable_adapters,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora.adapter import Adapter
from lightning_lora.frozen import FrozenStatistics, WithoutFastPath

NORMS = [
    pytest.param(lambda: nn.BatchNorm1d(6), id="BatchNorm1d"),
    pytest.param(lambda: nn.SyncBatchNorm(6), id="SyncBatchNorm"),
    pytest.param(lambda: nn.InstanceNorm1d(6, track_running_stats=True), id="InstanceNorm1d"),
]


def net(norm: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), norm or nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def train_adapters(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, Adapter):
            for parameter in child.parameters():
                nn.init.normal_(parameter)


@pytest.mark.parametrize("build", NORMS)
def test_running_statistics_do_not_move_in_training(build: Any) -> None:
    module = net(build())
    inject_adapters(module, LoRAConfig(rank=2))
    module.train()
    before = {key: value.clone() for key, value in module[1].state_dict().items()}
    if not isinstance(module[1], nn.SyncBatchNorm):  # which computes on a GPU only
        module[1](torch.randn(8, 6, 5))
    assert not module[1].training
    assert all(torch.equal(value, before[key]) for key, value in module[1].state_dict().items())


def test_only_norms_that_track_statistics_are_kept_still() -> None:
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.LayerNorm(6), nn.Linear(6, 2)
    )
    report = inject_adapters(module, LoRAConfig(rank=2))
    assert report.notes == ()
    assert module[1].training
    assert type(module[1]) is nn.BatchNorm1d


def test_the_report_notes_kept_norms() -> None:
    assert any(
        "1 norm layers keep their running statistics" in note
        for note in inject_adapters(net(), LoRAConfig(rank=2)).notes
    )


def test_a_norm_that_is_trained_in_full_keeps_training() -> None:
    module = net()
    inject_adapters(module, LoRAConfig(rank=2, modules_to_save=["1"]))
    before = module[1].running_mean.clone()
    module(torch.randn(8, 4))
    assert module[1].training
    assert not torch.equal(module[1].running_mean, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_training", [True, False])
def test_removal_restores_class_mode_and_contents(training: bool, norm_training: bool) -> None:
    module = net().train(training)
    module[1].train(norm_training)
    contents = set(module[1].__dict__)
    inject_adapters(module, LoRAConfig(rank=2))
    assert isinstance(module[1], FrozenStatistics)
    remove_adapters(module)
    assert type(module[1]) is nn.BatchNorm1d
    assert module[1].training is norm_training
    assert set(module[1].__dict__) == contents


@pytest.mark.parametrize("change", ["remove", "merge"])
def test_a_module_put_in_eval_mode_meanwhile_has_its_norms_in_eval_mode(change: str) -> None:
    module = net()
    inject_adapters(module, LoRAConfig(rank=2))
    module.eval()
    x = torch.randn(8, 4)
    before = module(x)
    remove_adapters(module) if change == "remove" else merge_adapters(module)
    assert not module[1].training
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("change", ["remove", "merge"])
def test_a_module_put_in_train_mode_meanwhile_has_its_norms_in_train_mode(change: str) -> None:
    module = net().eval()
    inject_adapters(module, LoRAConfig(rank=2))
    module.train()
    remove_adapters(module) if change == "remove" else merge_adapters(module)
    assert module[1].training


def test_a_norm_that_the_user_holds_in_eval_mode_stays_there() -> None:
    module = net().train()
    module[1].eval()
    inject_adapters(module, LoRAConfig(rank=2))
    module.eval()
    module.train()
    remove_adapters(module)
    assert module.training
    assert not module[1].training


def test_unmerging_keeps_the_norms_still_again() -> None:
    module = net()
    inject_adapters(module, LoRAConfig(rank=2))
    merge_adapters(module)
    assert type(module[1]) is nn.BatchNorm1d
    assert module[1].training
    unmerge_adapters(module)
    module.train()
    assert not module[1].training


def test_frozen_norms_copy_and_pickle() -> None:
    module = net()
    inject_adapters(module, LoRAConfig(rank=2))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.train()
        assert not twin[1].training
        remove_adapters(twin)
        assert type(twin[1]) is nn.BatchNorm1d
    assert isinstance(module[1], FrozenStatistics)


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)  # of other weights a norm may enlarge the rounding that differs between its two modes
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, **options)


@pytest.mark.parametrize("padding", [False, True])
def test_evaluation_of_a_transformer_encoder_sees_the_adapters(padding: bool) -> None:
    module = encoder()
    inject_adapters(module, LoRAConfig(rank=2))
    train_adapters(module)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
    real = slice(None) if mask is None else ~mask
    module.train()
    wanted = module(x, src_key_padding_mask=mask)[real]
    module.eval()
    with torch.no_grad():
        seen = module(x, src_key_padding_mask=mask)[real]
        with disable_adapters(module):
            base = module(x, src_key_padding_mask=mask)[real]
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen, base, atol=1e-2)


def test_the_global_switch_of_the_fast_path_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = encoder().eval()
    inject_adapters(module, LoRAConfig(rank=2))
    switched: list[bool] = []
    monkeypatch.setattr(torch.backends.mha, "set_fastpath_enabled", switched.append)
    with torch.no_grad():
        module(torch.randn(2, 5, 16))
    assert torch.backends.mha.get_fastpath_enabled()
    assert switched == []


def test_an_encoder_whose_first_layer_has_no_adapters_passes_no_nested_tensors_to_the_others() -> None:
    module = encoder().eval()
    inject_adapters(module, LoRAConfig(rank=2, target_modules=[r"layers\.1\.linear1"]))
    nn.init.normal_(module.layers[1].linear1.adapters["default"].lora_B)
    x, mask = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[5], [3]])
    expected = module.train()(x, src_key_padding_mask=mask)[~mask]
    with torch.no_grad():
        seen = module.eval()(x, src_key_padding_mask=mask)[~mask]
    torch.testing.assert_close(seen, expected)


def test_encoders_without_adapters_keep_their_class() -> None:
    module = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(16, 2)})
    inject_adapters(module, LoRAConfig(rank=2, target_modules="head"))
    assert not any(isinstance(child, WithoutFastPath) for child in module.modules())


def test_removal_gives_encoders_their_class_back() -> None:
    module = encoder()
    types = [type(child) for child in module.modules()]
    inject_adapters(module, LoRAConfig(rank=2))
    assert isinstance(module, WithoutFastPath)
    remove_adapters(module)
    assert [type(child) for child in module.modules()] == types
