"""Merging is exact where it can be, says how far off it is where not, and can be undone bit by bit."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LightningLoRAError,
    LoRAConfig,
    MergeConfig,
    MergeError,
    disable_adapters,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora.adapter import Adapter
from lightning_lora.layers import AdaptedConv1D, detach_adapters
from lightning_lora.merging import is_merged, measure_merge
from tests.targets.architectures import build


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.b = Conv1D(6, 12)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 2)
        self.a.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.b(torch.relu(self.norm(self.a(x))))))


def adapted(dtype: torch.dtype = torch.float32, size: float = 0.1, **options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().to(dtype).eval()
        inject_adapters(net, LoRAConfig(**{"rank": 2, "alpha": 4, **options}))
        for child in net.modules():
            if isinstance(child, Adapter):
                nn.init.normal_(child.get_parameter("lora_B"), std=size)
    return net


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[key]) for key, value in one.items())


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)],
)
def test_merged_outputs_are_the_adapted_ones_within_rounding(dtype: torch.dtype, tolerance: float) -> None:
    net = adapted(dtype)
    before = net(inputs(dtype)).double()
    merge_adapters(net)
    after = net(inputs(dtype)).double()
    assert (after - before).norm() / before.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype) -> None:
    net = adapted(dtype)
    adapter = net.a.adapters["default"]
    wide = torch.promote_types(dtype, torch.float32)
    exact = net.a.weight.to(wide) + (adapter.lora_B.to(wide) @ adapter.lora_A.to(wide)) * 2.0
    merge_adapters(net)
    assert net.a.weight.dtype == dtype
    assert torch.equal(net.a.weight, exact.to(dtype))


def test_a_conv1d_is_merged_in_its_own_layout() -> None:
    net = adapted()
    adapter = net.b.adapters["default"]
    exact = net.b.weight + (adapter.lora_B @ adapter.lora_A).T * 2.0
    merge_adapters(net)
    assert net.b.weight.shape == (12, 6)
    assert net.b.weight.is_contiguous()
    torch.testing.assert_close(net.b.weight, exact)


def test_a_merged_module_is_plain_again() -> None:
    net, plain = adapted(modules_to_save=["head"]), Net().eval()
    merge_adapters(net)
    assert is_merged(net)
    assert [(n, type(m), m.training) for n, m in net.named_modules()] == [
        (n, type(m), m.training) for n, m in plain.named_modules()
    ]
    assert [(n, p.requires_grad) for n, p in net.named_parameters()] == [
        (n, p.requires_grad) for n, p in plain.named_parameters()
    ]
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict(), strict=True)


def test_parameters_stay_the_same_objects() -> None:
    net = adapted()
    before = id(net.a.weight), id(net.b.weight)
    merge_adapters(net)
    assert (id(net.a.weight), id(net.b.weight)) == before
    unmerge_adapters(net)
    assert (id(net.a.weight), id(net.b.weight)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_is_bit_exact(dtype: torch.dtype) -> None:
    net = adapted(dtype, modules_to_save=["head"])
    before, output = bits(net), net(inputs(dtype))
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    types = [type(child) for child in net.modules()]
    for _ in range(3):
        merge_adapters(net)
        unmerge_adapters(net)
    assert same(bits(net), before)
    assert torch.equal(net(inputs(dtype)), output)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert [type(child) for child in net.modules()] == types
    assert not is_merged(net)


def test_adapter_dropout_follows_the_mode_that_the_module_was_put_in_meanwhile() -> None:
    net = adapted(dropout=0.5).train()
    merge_adapters(net)
    net.eval()
    unmerge_adapters(net)
    assert torch.equal(net(inputs()), net(inputs()))


def test_training_goes_on_after_an_unmerge() -> None:
    net = adapted()
    merge_adapters(net)
    unmerge_adapters(net)
    net(inputs()).sum().backward()
    assert net.a.adapters["default"].lora_A.grad is not None
    assert net.a.weight.grad is None


def test_a_module_cast_while_merged_can_be_unmerged() -> None:
    net = adapted()
    weight = net.a.weight.clone()
    merge_adapters(net)
    net.double()
    unmerge_adapters(net)
    assert net.a.weight.dtype == torch.float64
    assert torch.equal(net.a.weight, weight.double())
    net(inputs(torch.float64))


def test_disabled_adapters_are_not_merged_and_still_come_back() -> None:
    net = adapted()
    before = bits(net)
    with disable_adapters(net):
        base = net(inputs())
        report = merge_adapters(net)
        assert all(layer.update == 0 for layer in report.layers)
    assert torch.equal(net(inputs()), base)
    unmerge_adapters(net)
    assert same(bits(net), before)


def test_removing_after_a_merge_keeps_the_merged_weights_as_the_new_base() -> None:
    net = adapted()
    merge_adapters(net)
    merged, output = bits(net), net(inputs())
    remove_adapters(net)
    assert same(bits(net), merged)
    inject_adapters(net, LoRAConfig(rank=1))
    assert torch.equal(net(inputs()), output)
    with pytest.raises(MergeError, match="not merged"):
        unmerge_adapters(net)


@pytest.mark.parametrize(
    ("prepare", "action", "message"),
    [
        (lambda net: remove_adapters(net), merge_adapters, "has no adapters to merge"),
        (lambda net: merge_adapters(net), merge_adapters, "are merged already"),
        (lambda net: None, unmerge_adapters, "The module is not merged"),
        (lambda net: remove_adapters(net), unmerge_adapters, "The module is not merged"),
    ],
)
def test_a_merge_at_the_wrong_time_is_refused(prepare: Any, action: Any, message: str) -> None:
    net = adapted()
    prepare(net)
    before = bits(net)
    with pytest.raises(MergeError, match=message):
        action(net)
    assert same(bits(net), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", ["a", "b"])
def test_a_weight_that_is_not_finite_refuses_the_whole_merge(layer: str, value: float) -> None:
    net = adapted()
    with torch.no_grad():
        net.get_submodule(layer).adapters["default"].lora_B[0, 0] = value  # type: ignore[union-attr, index]
    net.get_submodule(layer).adapters.eval()  # type: ignore[operator, union-attr]
    before, kinds = bits(net), [(type(child), child.training) for child in net.modules()]
    with pytest.raises(MergeError, match=rf"merged weight of '{layer}' is not finite"):
        merge_adapters(net)
    assert [(type(child), child.training) for child in net.modules()] == kinds
    after = bits(net)
    assert all(torch.equal(after[key].nan_to_num(0.5), before[key].nan_to_num(0.5)) for key in before | after)
    assert not is_merged(net)


def test_an_overflow_of_the_weight_s_dtype_is_refused() -> None:
    net = adapted(torch.float16, size=1e5)
    with pytest.raises(MergeError, match=r"overflows torch\.float16.*in a wider dtype"):
        merge_adapters(net)


def test_an_update_that_rounding_would_lose_is_refused_and_a_wider_dtype_is_named() -> None:
    net = adapted(torch.bfloat16, size=1e-5)
    before = bits(net)
    with pytest.raises(MergeError, match=r"Rounding to bfloat16 would lose \d+% of the update .*dtype=\"float32\""):
        merge_adapters(net)
    assert same(bits(net), before)
    report = measure_merge(net, MergeConfig(dtype="float32"))
    assert report.relative_error < 1e-2
    merge_adapters(net, MergeConfig(tolerance=10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_measures_every_layer_against_its_update(dtype: torch.dtype) -> None:
    net = adapted(dtype)
    weight = net.a.weight.double()
    adapter = net.a.adapters["default"]
    update = (adapter.lora_B.double() @ adapter.lora_A.double()) * 2.0
    report = merge_adapters(net)
    row = {layer.name: layer for layer in report.layers}["a"]
    error = (net.a.weight.double() - weight - update).norm() / update.norm()
    assert row.update == pytest.approx(update.norm().item(), rel=1e-5)
    assert row.weight == pytest.approx(weight.norm().item(), rel=1e-5)
    assert row.error == pytest.approx(error.item(), rel=0.2)
    assert report.max_relative_error == max(layer.error for layer in report.layers)
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_the_report_of_untrained_adapters_is_zero() -> None:
    net = adapted(size=0.0)
    before = net.a.weight.clone()
    report = merge_adapters(net)
    assert report.relative_error == 0.0
    assert all(layer.update == layer.error == 0.0 for layer in report.layers)
    assert torch.equal(net.a.weight, before)


def test_measuring_changes_nothing() -> None:
    net = adapted()
    before = bits(net)
    measure_merge(net, MergeConfig())
    assert same(bits(net), before)
    assert not is_merged(net)


def test_the_report_is_plain_json_and_prints() -> None:
    report = merge_adapters(adapted())
    values = json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in values["layers"]] == ["a", "b"]
    assert values["max_relative_error"] == report.max_relative_error
    file = io.StringIO()
    Console(file=file, width=100).print(report)
    assert "2 layers, worst first" in file.getvalue()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "torch encoder"])
def test_real_architectures_merge_and_unmerge(name: str) -> None:
    model = build(name).eval()
    original = copy.deepcopy(model.state_dict())
    inject_adapters(model, LoRAConfig(rank=2))
    for child in model.modules():
        if isinstance(child, Adapter):
            nn.init.normal_(child.get_parameter("lora_B"), std=0.1)
    tokens = torch.tensor([[1, 5, 3, 2]])
    options: dict[str, Any] = {"decoder_input_ids": tokens} if name == "t5" else {}
    example = torch.randn(2, 4, 16) if name == "torch encoder" else tokens

    def output() -> Tensor:
        with torch.no_grad():
            result = model(example, **options)
        return result if isinstance(result, Tensor) else result.logits

    adapted_output = output()
    merge_adapters(model)
    assert list(model.state_dict()) == list(original)
    torch.testing.assert_close(output(), adapted_output, rtol=1e-4, atol=1e-4)
    unmerge_adapters(model)
    assert torch.equal(output(), adapted_output)
    remove_adapters(model)
    assert same(dict(model.state_dict()), dict(original))


def test_weights_loaded_after_a_merge_are_not_thrown_away_by_an_unmerge() -> None:
    net = adapted()
    merge_adapters(net)
    net.load_state_dict({key: torch.full_like(value, 3.0) for key, value in net.state_dict().items()})
    loaded = bits(net)
    with pytest.raises(MergeError, match=r"weight of 'a' is not the merged one any more.*remove_adapters\(module\)"):
        unmerge_adapters(net)
    assert same(bits(net), loaded)
    assert is_merged(net)
    remove_adapters(net)
    assert same(bits(net), loaded)


def test_a_layer_replaced_after_a_merge_is_not_taken_for_the_merged_one() -> None:
    net = adapted()
    merge_adapters(net)
    net.b = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(MergeError, match="weight of 'b' is not the merged one"):
        unmerge_adapters(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_alone_does_not_count_as_a_change_of_the_merged_weights(dtype: torch.dtype) -> None:
    net = adapted()
    merge_adapters(net)
    unmerged = copy.deepcopy(adapted()).to(dtype)
    net.to(dtype)
    unmerge_adapters(net)
    assert torch.equal(net.b.weight, unmerged.b.weight)
    merge_adapters(net)
    with torch.no_grad():
        net.b.weight[0, 0] *= 1.5
    with pytest.raises(MergeError, match="weight of 'b' is not the merged one"):
        unmerge_adapters(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_and_edited_weight_is_no_merged_one(dtype: torch.dtype) -> None:
    net = adapted()
    merge_adapters(net)
    net.to(dtype)
    with torch.no_grad():
        net.a.weight[0, 0] *= 1 + 2 * torch.finfo(dtype).eps
    with pytest.raises(MergeError, match="weight of 'a' is not the merged one"):
        unmerge_adapters(net)


def test_what_is_trained_beside_the_merged_layers_does_not_hinder_an_unmerge() -> None:
    net = adapted()
    before = net.a.weight.clone()
    merge_adapters(net)
    with torch.no_grad():
        net.a.bias.add_(1.0)
    unmerge_adapters(net)
    assert torch.equal(net.a.weight, before)


class Scaled(nn.Linear):
    """Equalized learning rate: scales what the weight gives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.1


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.normalize(self.weight, dim=1)
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), weight, self.bias)


class Polite(nn.Linear):
    """Overrides forward to count its calls, and computes what nn.Linear does."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Paired(nn.Linear):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


def holding(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    net = nn.ModuleDict({"own": layer, "plain": nn.Linear(4, 4)}).to(dtype)
    inject_adapters(net, LoRAConfig(rank=2))
    for child in net.modules():
        if isinstance(child, Adapter):
            nn.init.normal_(child.get_parameter("lora_B"), std=0.1)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [Scaled, Cosine])
def test_a_layer_that_does_more_than_multiply_is_not_merged_wrongly(cls: type[nn.Linear], dtype: torch.dtype) -> None:
    net = holding(cls(8, 4), dtype)
    before = bits(net)
    with pytest.raises(MergeError, match=rf"'own' can't be merged: {cls.__name__}\.forward .*exclude_modules"):
        merge_adapters(net)
    assert same(bits(net), before)
    assert not is_merged(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_whose_own_forward_is_linear_is_merged_and_sees_nothing_of_the_probe(dtype: torch.dtype) -> None:
    net = holding(Polite(8, 4), dtype)
    called: list[Any] = []
    net["own"].register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    merge_adapters(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert not called
    assert net["own"].calls == 0


def test_untrained_adapters_of_such_a_layer_are_merged() -> None:
    net = nn.ModuleDict({"own": Scaled(8, 4)})
    inject_adapters(net, LoRAConfig(rank=2))
    merge_adapters(net)
    assert is_merged(net)


def test_a_layer_that_cannot_be_called_with_one_tensor_is_merged_with_a_warning() -> None:
    net = holding(Paired(8, 4))
    with pytest.warns(UserWarning, match=r"merge of 'own' is not verified: Paired\.forward"):
        merge_adapters(net)
    assert is_merged(net)


def test_a_merge_that_is_interrupted_when_all_weights_are_merged_is_taken_back(monkeypatch: Any) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    net = adapted()
    before = bits(net)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.merging.merge.base_sums", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_adapters(net)
    assert same(bits(net), before)
    merge_adapters(net)
    unmerge_adapters(net)
    assert same(bits(net), before)


def for_good(net: nn.Module, **options: Any) -> Any:
    return merge_adapters(net, MergeConfig(keep_base=False, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_for_good_gives_the_weights_and_the_report_of_one_that_keeps_the_base(dtype: torch.dtype) -> None:
    kept, lost = adapted(dtype), adapted(dtype)
    assert for_good(lost) == merge_adapters(kept)
    assert same(bits(lost), bits(kept))
    assert [type(child) for child in lost.modules()] == [type(child) for child in Net().modules()]
    assert [p.requires_grad for p in lost.parameters()] == [p.requires_grad for p in kept.parameters()]


def test_a_merge_for_good_keeps_no_second_set_of_weights() -> None:
    net = adapted()
    weak = [weakref.ref(child.weight.untyped_storage()) for child in (net.a, net.b)]
    adapters = [weakref.ref(child) for child in net.modules() if isinstance(child, Adapter)]
    for_good(net)
    gc.collect()
    assert not any(reference() for reference in (*weak, *adapters))


def test_there_is_no_way_back_from_a_merge_for_good_but_it_is_a_plain_module() -> None:
    net = adapted()
    for_good(net)
    assert is_merged(net)
    for action in (unmerge_adapters, merge_adapters):
        with pytest.raises(MergeError):
            action(net)
    weights = bits(net)
    remove_adapters(net)
    assert same(bits(net), weights)
    inject_adapters(net, LoRAConfig(rank=2))


def test_a_merge_for_good_that_would_not_be_right_changes_nothing() -> None:
    net = adapted(torch.bfloat16, size=1e-6)
    before = bits(net)
    with pytest.raises(MergeError, match="would lose"):
        for_good(net)
    assert same(bits(net), before)
    assert not is_merged(net)


@contextmanager
def interrupts(handler: Any, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C comes whenever a layer's adapters are taken off, and ``handler`` gets it; a job's parent may ignore it."""

    def interrupted(layer: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return detach_adapters(layer)

    patch.setattr("lightning_lora.merging.for_good.detach_adapters", interrupted)
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_interrupt_waits_until_a_merge_for_good_is_complete(monkeypatch: Any) -> None:
    net, plain = adapted(), adapted()
    merge_adapters(plain)
    with interrupts(signal.default_int_handler, monkeypatch), pytest.raises(KeyboardInterrupt):
        for_good(net)
    assert is_merged(net)
    assert same(bits(net), bits(plain))


def test_a_handler_of_the_users_own_gets_the_interrupt_when_a_merge_for_good_is_complete(monkeypatch: Any) -> None:
    net, seen = adapted(), []
    with interrupts(lambda *_: seen.append(is_merged(net)), monkeypatch):
        for_good(net)
    assert seen == [True]


def test_what_an_error_leaves_of_a_merge_for_good_computes_the_same_and_merging_again_goes_on(monkeypatch: Any) -> None:
    net, plain = adapted(), adapted()
    merge_adapters(plain)
    expected = net(inputs())

    def no_memory(_: Tensor) -> Tensor:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(AdaptedConv1D, "as_weight", staticmethod(no_memory))  # of b; a is merged by then
        with pytest.raises(LightningLoRAError, match=r"stopped \(MemoryError: no more\).*live adapters"):
            for_good(net)
    assert type(net.a) is nn.Linear
    torch.testing.assert_close(net(inputs()), expected, rtol=1e-5, atol=1e-6)
    for_good(net)
    assert same(bits(net), bits(plain))
