"""Injection changes what a module trains and nothing else; removal leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    MergeError,
    TargetNotFoundError,
    UnsupportedSetupError,
    disable_adapters,
    inject_adapters,
    merge_adapters,
    remove_adapters,
)
from lightning_lora.adapter import Adapter
from lightning_lora.injection import extend_adapters
from lightning_lora.layers import AdaptedLayer
from tests.targets.architectures import build


class Net(nn.Module):
    """Something of everything: dropout, norms, buffers, a frozen layer, a list of blocks, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 12), "norm": nn.BatchNorm1d(12), "down": nn.Linear(12, 8)})
            for _ in range(3)
        )
        self.drop = nn.Dropout(0.0)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.blocks[0]["up"].bias.requires_grad_(False)  # the user's own choice

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.drop(block["down"](torch.relu(block["norm"](block["up"](x)))))
        return self.head(x * self.scale)


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def randomize(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, Adapter):
            for parameter in child.parameters():
                nn.init.normal_(parameter)


def trainable(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def traces(module: nn.Module) -> list[Any]:
    """Everything about a module that a removal has to bring back."""
    return [
        [(name, type(child), child.training, sorted(child.__dict__)) for name, child in module.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype) for name, p in module.named_parameters()],
        {key: value.clone().numpy().tobytes() for key, value in module.state_dict().items()},
        list(module.state_dict()),
        {name: [*child._forward_hooks, *child._forward_pre_hooks] for name, child in module.named_modules()},
    ]


@pytest.mark.parametrize("training", [True, False])
def test_removal_restores_everything_exactly(net: Net, training: bool) -> None:
    net.train(training)
    before = traces(net)
    inject_adapters(net, LoRAConfig(rank=2, modules_to_save=["head", "blocks.1.norm"]))
    assert traces(net) != before
    randomize(net)
    with torch.no_grad():
        net.head.weight.add_(1.0)
        net.blocks[1]["norm"].running_mean.add_(1.0)
    remove_adapters(net)
    assert traces(net) == before


def test_removal_without_adapters_and_twice_does_nothing(net: Net) -> None:
    before = traces(net)
    remove_adapters(net)
    assert traces(net) == before
    inject_adapters(net, LoRAConfig(rank=2))
    remove_adapters(net)
    remove_adapters(net)
    assert traces(net) == before


def test_names_objects_hooks_and_isinstance_stay(net: Net) -> None:
    modules = dict(net.named_modules())
    parameters = dict(net.named_parameters())
    calls: list[str] = []
    net.blocks[0]["up"].register_forward_hook(lambda *_: calls.append("hook"))
    net.blocks[0]["up"].register_forward_pre_hook(lambda *_: calls.append("pre"))
    inject_adapters(net, LoRAConfig(rank=2))
    after = dict(net.named_modules())
    assert all(after[name] is child for name, child in modules.items())
    assert all(dict(net.named_parameters())[name] is p for name, p in parameters.items())
    assert isinstance(net.blocks[0]["up"], nn.Linear)
    net.eval()(torch.randn(2, 8))
    assert calls == ["pre", "hook"]


def test_exactly_the_adapters_and_saved_modules_train(net: Net) -> None:
    inject_adapters(net, LoRAConfig(rank=2, target_modules="up", modules_to_save=["head"]))
    adapters = {f"blocks.{i}.up.adapters.default.lora_{side}" for i in range(3) for side in "AB"}
    assert trainable(net) == adapters | {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_0_outputs_are_bitwise_those_of_the_base(net: Net, dtype: torch.dtype) -> None:
    net.to(dtype).eval()
    x = torch.randn(5, 8, dtype=dtype)
    before = net(x)
    inject_adapters(net, LoRAConfig(rank=2, dropout=0.3))
    assert torch.equal(net(x), before)


def test_step_0_outputs_are_bitwise_those_of_the_base_under_autocast(net: Net) -> None:
    net.eval()
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = net(x)
    inject_adapters(net, LoRAConfig(rank=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(["llama", "gpt2", "bert", "t5", "torch encoder"], [torch.float32, torch.bfloat16]),
        ("lightning demo", torch.float32),  # which cannot run in bf16 itself
    ],
)
def test_step_0_outputs_of_real_architectures_are_bitwise_those_of_the_base(name: str, dtype: torch.dtype) -> None:
    fused = name in ("torch encoder", "lightning demo")  # their fused evaluation rounds differently
    model = build(name).to(dtype).train(fused)
    for child in model.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = 0.0
    tokens = torch.tensor([[1, 5, 3, 2]])
    inputs: tuple[Any, ...] = (torch.randn(2, 4, 16, dtype=dtype),) if name == "torch encoder" else (tokens,)
    options: dict[str, Any] = {"t5": {"decoder_input_ids": tokens}}.get(name, {})
    inputs = (*inputs, tokens) if name == "lightning demo" else inputs

    def output() -> Tensor:
        with torch.no_grad():
            result = model(*inputs, **options)
        return result if isinstance(result, Tensor) else result.logits

    # torch.matmul computes in another way with what requires grad, and on some CPUs rounds differently then: a frozen
    # base is what an adapted one can be compared with.
    model.requires_grad_(False)
    before = output()
    inject_adapters(model, LoRAConfig(rank=2))
    assert torch.equal(output(), before)


def test_training_moves_the_adapters_and_leaves_the_base_bit_for_bit(net: Net) -> None:
    base = {key: value.clone() for key, value in net.state_dict().items()}
    inject_adapters(net, LoRAConfig(rank=2))
    start = {key: value.clone() for key, value in net.state_dict().items() if "lora" in key}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
    state = net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())
    assert all(not torch.equal(state[key], value) for key, value in start.items())


def test_a_stale_gradient_of_the_base_is_dropped(net: Net) -> None:
    net(torch.randn(6, 8)).sum().backward()
    inject_adapters(net, LoRAConfig(rank=2, modules_to_save=["head"]))
    assert all(p.grad is None for name, p in net.named_parameters() if not name.startswith("head"))


def test_injecting_again_with_the_same_config_changes_nothing(net: Net) -> None:
    config = LoRAConfig(rank=2)
    first = inject_adapters(net, config)
    randomize(net)
    before = traces(net)
    assert inject_adapters(net, config) == first
    assert traces(net) == before


def test_layers_that_came_since_are_adapted_by_a_second_call(net: Net) -> None:
    config = LoRAConfig(rank=2)
    inject_adapters(net, config)
    randomize(net)
    kept = net.blocks[0]["up"].adapters["default"].lora_A.clone()
    net.extra = nn.Linear(8, 8)
    report = inject_adapters(net, config)
    assert isinstance(net.extra, AdaptedLayer)
    assert "extra" in [row.name for row in report.layers]
    assert not net.extra.weight.requires_grad
    assert torch.equal(net.blocks[0]["up"].adapters["default"].lora_A, kept)


def test_the_same_name_with_another_config_is_refused(net: Net) -> None:
    inject_adapters(net, LoRAConfig(rank=2))
    before = traces(net)
    with pytest.raises(ValueError, match=r"adapter 'default' is already there .* remove_adapters\(module\) first"):
        inject_adapters(net, LoRAConfig(rank=3))
    assert traces(net) == before


def test_a_second_name_adds_a_second_adapter_that_becomes_the_active_one(net: Net) -> None:
    inject_adapters(net, LoRAConfig(rank=2))
    report = inject_adapters(net, LoRAConfig(rank=3), name="other")
    assert report.adapter == "other"
    assert {row.rank for row in report.layers} == {3}
    assert all(".other." in name for name in trainable(net))
    assert net.blocks[0]["up"].active == ("other",)
    assert set(net.blocks[0]["up"].adapters) == {"default", "other"}
    remove_adapters(net)
    assert not any("lora" in key for key in net.state_dict())


@pytest.mark.parametrize("name", ["", "two words", "a.b", "keys", "items", "0", "forward", 5, None])
def test_a_name_that_cannot_be_a_module_name_is_refused(net: Net, name: Any) -> None:
    before = traces(net)
    with pytest.raises(ValueError, match="must be a Python identifier"):
        inject_adapters(net, LoRAConfig(rank=2), name=name)
    assert traces(net) == before


@pytest.mark.parametrize("config", [None, {"rank": 2}, "all-linear", LoRAConfig])
def test_a_config_of_another_type_is_refused(net: Net, config: Any) -> None:
    with pytest.raises(ValueError, match="config must be an adapter config such as LoRAConfig"):
        inject_adapters(net, config)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "nothing"},
        {"target_modules": ["up", "nothing"]},
        {"target_modules": "drop"},
        {"modules_to_save": ["nothing"]},
        {"exclude_modules": ["nothing"]},
        {"exclude_modules": ["up", "down", "head"]},
        {"rank_pattern": {"nothing": 2}},
        {"alpha_pattern": {"head": 2.0}},
        {"layers": 3},
        {"layers": ["last-half", 17]},
        {"layers": "first-half"},
        {"target_modules": "u(p"},
    ],
    ids=str,
)
def test_a_refused_injection_leaves_no_trace(net: Net, options: dict[str, Any]) -> None:
    before = traces(net)
    with pytest.raises((TargetNotFoundError, ValueError)):
        inject_adapters(net, LoRAConfig(**{"rank": 2, **options}))
    assert traces(net) == before


def test_a_part_that_was_adapted_on_its_own_is_refused(net: Net) -> None:
    inject_adapters(net.blocks, LoRAConfig(rank=2))
    with pytest.raises(UnsupportedSetupError, match=r"'blocks' inside this module was already adapted"):
        inject_adapters(net, LoRAConfig(rank=2))


def test_a_merged_module_is_refused(net: Net) -> None:
    inject_adapters(net, LoRAConfig(rank=2))
    merge_adapters(net)
    with pytest.raises(MergeError, match=r"merged\. Call unmerge_adapters"):
        inject_adapters(net, LoRAConfig(rank=2))


def test_modules_to_save_takes_modules_and_parameters(net: Net) -> None:
    report = inject_adapters(net, LoRAConfig(rank=2, target_modules="up", modules_to_save=["blocks.0.down", "scale"]))
    assert dict(report.saved) == {"blocks.0.down.weight": 96, "blocks.0.down.bias": 8, "scale": 8}
    assert {"blocks.0.down.weight", "blocks.0.down.bias", "scale"} <= trainable(net)


def test_a_module_to_save_gets_no_adapter_and_says_so(net: Net) -> None:
    report = inject_adapters(net, LoRAConfig(rank=2, modules_to_save=["blocks.0"]))
    assert not isinstance(net.blocks[0]["up"], AdaptedLayer)
    assert report.skipped["blocks.0.up"] == "trained in full (modules_to_save)"


def test_a_module_to_save_that_the_user_had_frozen_trains(net: Net) -> None:
    inject_adapters(net, LoRAConfig(rank=2, target_modules="down", modules_to_save=["blocks.0.up"]))
    assert net.blocks[0]["up"].bias.requires_grad
    remove_adapters(net)
    assert not net.blocks[0]["up"].bias.requires_grad


def test_a_module_to_save_that_matches_nothing_names_the_nearest(net: Net) -> None:
    with pytest.raises(TargetNotFoundError, match=r"modules_to_save: 'haed' matches no module or parameter.*'head'"):
        inject_adapters(net, LoRAConfig(rank=2, modules_to_save=["haed"]))


def test_counts_of_the_report_are_those_of_the_module(net: Net) -> None:
    report = inject_adapters(net, LoRAConfig(rank=2, modules_to_save=["head"]))
    assert report.trainable_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert report.total_parameters == sum(p.numel() for p in net.parameters())
    assert sum(row.trainable for row in report.layers) + 18 == report.trainable_parameters


def test_an_incomplete_module_is_adapted_as_far_as_it_goes(net: Net) -> None:
    config = LoRAConfig(rank=2, target_modules=["up", "later"])
    assert extend_adapters(nn.Module(), config, strict=False) is None
    assert extend_adapters(net, config, strict=False) is not None
    with pytest.raises(TargetNotFoundError, match="'later' matches no module"):
        extend_adapters(net, config, strict=True)


def test_disabled_adapters_give_the_base_and_come_back(net: Net) -> None:
    net.eval()
    x = torch.randn(5, 8)
    before = net(x)
    inject_adapters(net, LoRAConfig(rank=2))
    randomize(net)
    adapted = net(x)
    with disable_adapters(net):
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), adapted)
    with pytest.raises(KeyError), disable_adapters(net):
        raise KeyError
    assert torch.equal(net(x), adapted)
    assert not torch.equal(adapted, before)


def test_removing_or_merging_while_disabled_leaves_plain_layers(net: Net) -> None:
    before = traces(net)
    inject_adapters(net, LoRAConfig(rank=2))
    with disable_adapters(net):
        remove_adapters(net)
    assert traces(net) == before


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_independent_and_complete(net: Net, copier: Any) -> None:
    net.eval()
    inject_adapters(net, LoRAConfig(rank=2, modules_to_save=["head"]))
    randomize(net)
    twin = copier(net)
    x = torch.randn(5, 8)
    assert torch.equal(twin(x), net(x))
    assert trainable(twin) == trainable(net)
    remove_adapters(twin)
    assert type(twin.blocks[0]["up"]) is nn.Linear
    assert isinstance(net.blocks[0]["up"], AdaptedLayer)
    inject_adapters(twin, LoRAConfig(rank=2))


def test_layers_without_bias_or_already_frozen_are_adapted() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4).requires_grad_(False))
    inject_adapters(net, LoRAConfig(rank=2))
    assert len(trainable(net)) == 4
    remove_adapters(net)
    assert trainable(net) == {"0.weight"}


def test_compiling_before_the_injection_changes_no_initial_value() -> None:
    plain, compiled = nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}), nn.ModuleDict()
    compiled["part"] = torch.compile(copy.deepcopy(plain["part"]), backend="eager")
    for module in (plain, compiled):
        inject_adapters(module, LoRAConfig(rank=2))
    values = {key.replace("_orig_mod.", ""): value for key, value in compiled.state_dict().items()}
    assert all(torch.equal(values[key], value) for key, value in plain.state_dict().items())


def test_tied_parameters_stay_tied_and_frozen() -> None:
    net = nn.ModuleDict({"emb": nn.Embedding(6, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 6, bias=False)})
    net["out"].weight = net["emb"].weight
    inject_adapters(net, LoRAConfig(rank=2))
    assert net["out"].weight is net["emb"].weight
    assert not net["out"].weight.requires_grad
    remove_adapters(net)
    assert net["out"].weight is net["emb"].weight
    assert net["out"].weight.requires_grad


@pytest.mark.parametrize(
    "buffer",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.zeros(0),
    ],
    ids=["sparse", "sparse csr", "complex", "empty"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_module_with_an_unusual_buffer_is_adapted_and_restored(net: Net, buffer: Callable[[], Tensor]) -> None:
    before = traces(net)
    net.register_buffer("unusual", buffer())
    inject_adapters(net, LoRAConfig(rank=2))
    remove_adapters(net)
    del net.unusual
    assert traces(net) == before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(LoRAConfig):
    """Fails at its third layer."""

    def make_adapter(self, layer: nn.Module, *, layer_name: str, rank: int, alpha: float) -> Any:
        if layer_name == "blocks.1.up":
            raise MemoryError("out of memory")
        return super().make_adapter(layer, layer_name=layer_name, rank=rank, alpha=alpha)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "with another adapter"])
def test_an_injection_that_fails_half_way_leaves_no_trace(net: Net, adapted: bool) -> None:
    if adapted:
        inject_adapters(net, LoRAConfig(rank=2, target_modules="up"))
    net(torch.randn(6, 8)).sum().backward()
    before, grads = traces(net), [p.grad for p in net.parameters()]
    active = [layer.active for layer in net.modules() if isinstance(layer, AdaptedLayer)]
    with pytest.raises(MemoryError):
        inject_adapters(net, Failing(rank=2), name="other")
    assert traces(net) == before
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
    assert [layer.active for layer in net.modules() if isinstance(layer, AdaptedLayer)] == active


@pytest.mark.parametrize("pattern", ["bias", "blocks.0.up.bias"])
def test_a_layer_whose_bias_is_trained_gets_an_adapter_too(net: Net, pattern: str) -> None:
    report = inject_adapters(net, LoRAConfig(rank=2, modules_to_save=[pattern]))
    assert isinstance(net.blocks[0]["up"], AdaptedLayer)
    assert net.blocks[0]["up"].bias.requires_grad
    assert "blocks.0.up" not in report.skipped


def test_a_second_adapter_acts_alone_and_the_first_stays_silent_until_asked_for(net: Net) -> None:
    net.eval()
    x = torch.randn(5, 8)
    base = net(x)
    first = LoRAConfig(rank=2)
    inject_adapters(net, first, name="a")
    randomize(net)
    inject_adapters(net, LoRAConfig(rank=2, target_modules="up"), name="b")
    assert torch.equal(net(x), base)
    active = {name: layer.active for name, layer in net.named_modules() if isinstance(layer, AdaptedLayer)}
    assert active["blocks.0.up"] == ("b",)
    assert active["blocks.0.down"] == ()
    trained = trainable(net)
    net.extra = nn.Linear(8, 8)
    inject_adapters(net, first, name="a")
    assert {n: m.active for n, m in net.named_modules() if isinstance(m, AdaptedLayer)} == {**active, "extra": ()}
    assert trainable(net) == trained
