"""What a recomputation does: the same numbers, whatever a block takes, returns and holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lora import UnsupportedSetupError, disable_adapters
from lightning_lora.gradient_checkpointing import (
    GradientCheckpointingConfig,
    enable_gradient_checkpointing,
    never_called,
)
from tests.gradient_checkpointing.cases import (
    Block,
    adapt,
    assert_same,
    build,
    call,
    gradients,
    loss_of,
    recomputations,
    rows,
    saved_bytes,
    stack,
)


def twins(module: nn.Module, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """The module without and with gradient checkpointing."""
    twin = copy.deepcopy(module)
    enable_gradient_checkpointing(twin, GradientCheckpointingConfig(**fields))
    return module, twin


def test_it_acts_exactly_when_gradients_are_recorded() -> None:
    for training in (True, False):
        plain, module = twins(stack().train(training))
        assert saved_bytes(module, rows()) < saved_bytes(plain, rows())
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert saved_bytes(module, rows()) == 0


def test_dropout_draws_the_same_masks_and_the_stream_goes_on_as_without() -> None:
    plain, module = twins(stack(dropout=0.5))
    expected = gradients(plain, rows(), seed=3)
    after = torch.rand(1)
    assert_same(gradients(module, rows(), seed=3), expected)
    assert torch.equal(torch.rand(1), after)
    other = gradients(module, rows(), seed=4)
    assert any(not torch.equal(value, other[key]) for key, value in expected.items())  # the masks do matter


def test_inputs_that_need_no_gradient_are_no_hindrance() -> None:
    module = build("stack")
    enable_gradient_checkpointing(module)
    found = gradients(module, rows())
    assert all(value is not None and value.abs().max() > 0 for value in found.values())


def test_gradients_reach_the_inputs() -> None:
    results = []
    for module in twins(stack()):
        x = rows()["input"].requires_grad_()
        loss_of(module(x)).backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_a_second_backward_through_the_same_graph_recomputes_again() -> None:
    plain, module = twins(build("resnet"))
    images = torch.linspace(-1, 1, 6 * 64).reshape(2, 3, 8, 8)
    for each in (plain, module):
        loss = loss_of(each(images))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(dict(_grads(module)), dict(_grads(plain)))
    assert_same(dict(module.named_buffers()), dict(plain.named_buffers()))


def test_second_derivatives_are_those_without() -> None:
    results = []
    for module in twins(stack()):
        x = rows()["input"].requires_grad_()
        (first,) = torch.autograd.grad(loss_of(module(x)), x, create_graph=True)
        first.square().sum().backward()
        results.append(dict(_grads(module)))
    assert_same(results[1], results[0])


def _grads(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [(key, parameter.grad) for key, parameter in module.named_parameters()]


@dataclass
class Parts:
    hidden: Tensor
    rest: Tensor | None


class Talkative(Block):
    """Takes and returns everything that a block may."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, scale: float, mask: Tensor | None = None, pair: Any = None, block: Any = ()
    ) -> Any:
        y = super().forward(x) * scale
        y = y if mask is None else y * mask
        if pair is not None:
            y = y + pair[0] * pair[1]
        return (Parts(y, None), {"names": block, "sum": y.sum(-1)}, None)


class Talk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Talkative(8) for _ in range(3))
        self.side = nn.Parameter(torch.ones(8))

    def forward(self, input: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            parts, rest, nothing = layer(
                input, scale=0.5, mask=(input > 0), pair=(self.side, self.side), block={"a": [1]}
            )
            assert nothing is None and parts.rest is None and rest["names"] == {"a": [1]}
            input, total = parts.hidden, total + rest["sum"].sum()
        return input * total


def test_a_block_may_take_and_return_anything() -> None:
    plain, module = twins(Talk())
    assert_same(gradients(module, rows()), gradients(plain, rows()))
    assert recomputations(module, rows()) == {f"layers.{i}": 1 for i in range(3)}


class Updating(Block):
    """Writes its result into the dict and the list inside it that it is passed, as blocks of graph networks do."""

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        hidden = super().forward(state["parts"][0] * (1 + state["runs"]))
        state["parts"][0], state["runs"] = hidden, state["runs"] + 1
        state["losses"].append(hidden.square().mean())
        return state


class UpdatingStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.blocks = nn.Linear(8, 8), nn.ModuleList(Updating(8, dropout=0.5) for _ in range(3))

    def forward(self, input: Tensor) -> Tensor:
        given = state = {"parts": [self.project(input)], "runs": 0, "losses": []}
        for block in self.blocks:
            state = block(state)
        assert state is given and state["runs"] == len(state["losses"]) == 3
        return state["parts"][0] * sum(state["losses"])


def test_a_block_may_change_dicts_and_lists_that_it_is_passed() -> None:
    plain, module = twins(UpdatingStack())
    assert_same(gradients(module, rows()), gradients(plain, rows()))


def test_a_tensor_in_a_list_that_is_changed_in_place_later_is_an_error_and_no_wrong_gradient() -> None:
    module = UpdatingStack()
    enable_gradient_checkpointing(module)
    hidden = rows()["input"]
    state = module.blocks[0]({"parts": [hidden], "runs": 0, "losses": []})
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state["parts"][0].sum().backward()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_the_adapters_of_the_first_run_act_in_the_second_one(backward_inside: bool) -> None:
    """A loss against the model without adapters, with gradients; then a backward within the context."""
    found = []
    for module in twins(build("stack")):
        torch.manual_seed(1)
        loss = loss_of(call(module, rows()))
        with disable_adapters(module):
            reference = loss_of(call(module, {"input": rows()["input"].requires_grad_()}))
            if backward_inside:
                (loss - reference).square().backward()
        if not backward_inside:
            (loss - reference).square().backward()
        found.append({key: grad for key, grad in _grads(module) if key.endswith(("lora_A", "lora_B"))})
        layers = [layer for layer in module.modules() if hasattr(layer, "active")]
        assert layers and all(layer.active == ("default",) for layer in layers)
    assert all(grad is not None and grad.abs().max() > 0 for grad in found[0].values())
    assert_same(found[1], found[0])


class Averaging(Block):
    """A block with a running mean of its own; in place or as a new tensor."""

    def __init__(self, *, in_place: bool = True) -> None:
        super().__init__(8)
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.mean = self.mean.copy_(mean) if self.in_place else mean
        return super().forward(x - self.mean)


def spectral() -> nn.Module:
    block = Block(8)
    nn.utils.parametrizations.spectral_norm(block.up)
    return block


@pytest.mark.parametrize(
    ("make", "buffer"),
    [
        (Averaging, "'mean'"),
        (lambda: Averaging(in_place=False), "'mean'"),
        (spectral, r"'up\.parametrizations\.weight\.0\._u'"),
    ],
    ids=["in place", "as a new tensor", "spectral_norm"],
)
def test_a_block_that_changes_a_buffer_of_its_own_is_refused_by_name(make: Any, buffer: str) -> None:
    _, module = twins(nn.Sequential(make(), make()))
    with pytest.raises(UnsupportedSetupError, match=rf"changes its buffer {buffer}.*blocks="):
        gradients(module, rows())


def test_a_buffer_that_stays_in_eval_mode_is_no_hindrance() -> None:
    plain, module = twins(nn.Sequential(Averaging(), Averaging()).eval())
    assert_same(gradients(module, rows()), gradients(plain, rows()))


class Table(Block):
    """Keeps a table in a buffer that grows with the input, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__(8)
        self.register_buffer("table", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < len(x):
            self.table = torch.arange(1.0, 1 + len(x))
        return super().forward(x * self.table[: len(x), None])


def test_a_table_that_grows_with_the_input_is_no_hindrance() -> None:
    plain, module = twins(nn.Sequential(Table(), Table()))
    assert_same(gradients(module, rows()), gradients(plain, rows()))


def test_blocks_whose_forward_is_never_called_with_gradients_are_named() -> None:
    module = stack()
    enable_gradient_checkpointing(module)
    with torch.no_grad():
        module(rows()["input"])
    assert never_called(module) == ["1", "2", "3", "4"]
    module[2](module[0](rows()["input"]))  # type: ignore[index]
    assert never_called(copy.deepcopy(module)) == never_called(module) == ["1", "3", "4"]
    enable_gradient_checkpointing(module)
    assert never_called(module) == ["1", "2", "3", "4"]


class Loop(nn.Module):
    """Calls its only pair of blocks again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, dropout=0.5), Block(8)])

    def forward(self, input: Tensor) -> Tensor:
        for _ in range(3):
            for block in self.blocks:
                input = block(input)
        return input


def test_a_block_that_is_called_several_times_is_recomputed_for_each_call() -> None:
    plain, module = twins(Loop())
    assert_same(gradients(module, rows()), gradients(plain, rows()))
    assert recomputations(module, rows()) == {"blocks.0": 3, "blocks.1": 3}


class Normed(Block):
    """A block with a norm that keeps running statistics."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(8)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_updated_once(momentum: float | None, training: bool) -> None:
    blocks = nn.Sequential(*(Normed(nn.BatchNorm1d(8, momentum=momentum)) for _ in range(2)))
    plain, module = twins(blocks.train(training))
    for _ in range(2):
        assert_same(gradients(module, rows()), gradients(plain, rows()))
    assert_same(dict(module.named_buffers()), dict(plain.named_buffers()))
    assert int(module[0].norm.num_batches_tracked) == (2 if training else 0)  # type: ignore[index, union-attr]


def test_running_statistics_stay_the_same_tensors() -> None:
    module = nn.Sequential(*(Normed(nn.BatchNorm1d(8)) for _ in range(2)))
    enable_gradient_checkpointing(module)
    before = dict(module.named_buffers())
    gradients(module, rows())
    assert all(before[key] is buffer for key, buffer in module.named_buffers())


def test_a_frozen_norm_keeps_its_statistics() -> None:
    plain, module = twins(adapt(nn.Sequential(*(Normed(nn.BatchNorm1d(8)) for _ in range(2)))).train())
    before = copy.deepcopy(dict(plain.named_buffers()))
    assert_same(gradients(module, rows()), gradients(plain, rows()))
    assert_same(dict(module.named_buffers()), before)


def test_an_input_that_is_changed_in_place_later_is_an_error_and_no_wrong_gradient() -> None:
    module = stack()
    enable_gradient_checkpointing(module, GradientCheckpointingConfig(blocks="1"))
    hidden = module[0](rows()["input"])  # type: ignore[index]
    output = module[1](hidden)  # type: ignore[index]
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_input_by_name_is_guarded_as_well() -> None:
    module = stack()
    enable_gradient_checkpointing(module, GradientCheckpointingConfig(blocks="1"))
    hidden = module[0](rows()["input"])  # type: ignore[index]
    output = module[1](x=hidden)  # type: ignore[index]
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_hooks_of_the_user_on_a_block_run_once() -> None:
    module, seen = stack(), []
    enable_gradient_checkpointing(module)
    module[1].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[index]
    loss_of(call(module, rows())).backward()
    assert seen == [1]


def test_offloading_changes_nothing_on_the_cpu() -> None:
    plain, module = twins(stack(dropout=0.5), offload=True)
    assert_same(gradients(module, rows()), gradients(plain, rows()))
    _, kept = twins(stack(dropout=0.5))
    assert saved_bytes(module, rows()) == saved_bytes(kept, rows())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("by_name", [False, True])
def test_offloading_holds_inputs_in_cpu_memory(by_name: bool) -> None:
    width = 1024
    blocks = [Block(width, dropout=0.5).cuda() for _ in range(8)]
    results, held = [], []
    for offload in (None, False, True):
        module = nn.Sequential(*copy.deepcopy(blocks))
        if offload is not None:
            enable_gradient_checkpointing(module, GradientCheckpointingConfig(offload=offload))
        torch.manual_seed(0)
        x = torch.ones(1024, width, device="cuda")
        before = torch.cuda.memory_allocated()
        for block in module:
            x = block(x=x) if by_name else block(x)
        held.append(torch.cuda.memory_allocated() - before)
        loss_of(x).backward()
        results.append(dict(_grads(module)))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    assert held[2] < held[1] / 4 < held[0] / 4


class Attending(nn.Module):
    """A block with attention, and projections that train."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts]
        return x + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_uses_the_kernel_of_the_first_run_when_backward_runs_outside_of_its_context(kernel: Any) -> None:
    torch.manual_seed(0)
    found = []
    for module in twins(nn.ModuleList(Attending() for _ in range(2))):
        x = torch.ones(2, 5, 16)
        with sdpa_kernel(kernel):
            for block in module:
                x = block(x)
        x.square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert all(map(torch.equal, *found))
