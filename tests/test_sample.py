"""One call of a module is kept, and repeated before and after a change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn

from lightning_lora.sample import SampleCall, agree, difference, rounding


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, *, factor: float = 1.0, extra: Any = None) -> dict[str, Any]:
        hidden = self.drop(self.fc(x)) * factor
        return {"hidden": hidden, "nested": [hidden.sum()], "index": torch.tensor([1]), "text": "x"}


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.other = nn.Linear(3, 3)

    def training_step(self, x: Tensor, **options: Any) -> Tensor:
        return self.inner(self.other(x), **options)["hidden"].sum()


@pytest.fixture
def root() -> Root:
    return Root()


def hooks(root: nn.Module) -> int:
    return sum(len(child._forward_pre_hooks) for child in root.modules())


def test_the_outermost_module_around_the_layer_that_is_called_is_kept(root: Root) -> None:
    sample = SampleCall()
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(2, 3))
    assert sample.name == "inner"
    assert hooks(root) == 0


def test_the_root_is_kept_when_it_is_called() -> None:
    root = nn.Sequential(nn.Linear(3, 3))
    sample = SampleCall()
    sample.watch(root, "0")
    root(torch.ones(2, 3))
    assert sample.name == ""


def test_outputs_are_all_floating_point_tensors_in_fp32_and_in_eval_mode(root: Root) -> None:
    sample = SampleCall()
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(2, 3), factor=2.0)
    outputs = sample.outputs(root)
    assert outputs is not None
    assert [tuple(output.shape) for output in outputs] == [(2, 3), ()]
    wanted = root.inner.fc(root.other(torch.ones(2, 3))) * 2.0  # without dropout, with the keyword
    torch.testing.assert_close(outputs[0], wanted.detach())
    root.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = sample.outputs(root)
    assert low is not None
    assert low[0].dtype == torch.float32


def test_repeating_leaves_modes_gradients_and_random_stream_alone(root: Root) -> None:
    root.train()
    root.inner.drop.eval()
    sample = SampleCall()
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(2, 3))
    modes = [child.training for child in root.modules()]
    state = torch.get_rng_state()
    outputs = sample.outputs(root)
    assert outputs is not None
    assert not outputs[0].requires_grad
    assert [child.training for child in root.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batch_is_a_copy(root: Root) -> None:
    sample = SampleCall()
    sample.watch(root.inner, "fc")
    batch = torch.ones(2, 3)
    root.inner(batch)
    before = sample.outputs(root.inner)
    batch.add_(5.0)
    after = sample.outputs(root.inner)
    assert before is not None
    assert after is not None
    assert torch.equal(before[0], after[0])


def test_only_the_first_call_is_kept(root: Root) -> None:
    sample = SampleCall()
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(2, 3))
    root.training_step(torch.ones(7, 3))
    outputs = sample.outputs(root)
    assert outputs is not None
    assert outputs[0].shape == (2, 3)


def test_without_a_call_there_is_nothing(root: Root) -> None:
    sample = SampleCall()
    assert sample.outputs(root) is None
    sample.watch(root, "inner.fc")
    assert sample.outputs(root) is None
    assert hooks(root) > 0
    sample.forget()
    assert hooks(root) == 0


def test_forgetting_drops_the_batch_and_watching_again_starts_anew(root: Root) -> None:
    sample = SampleCall()
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(2, 3))
    sample.forget()
    assert sample.outputs(root) is None
    sample.watch(root, "inner.fc")
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(4, 3))
    assert hooks(root) == 0
    assert sample.outputs(root) is not None


class Moody(nn.Module):
    """Its forward works once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.used = False

    def forward(self, x: Tensor) -> Tensor:
        if self.used:
            raise RuntimeError("not outside the training step")
        self.used = True
        return self.fc(x)


def test_a_call_that_cannot_be_repeated_is_no_error_and_modes_come_back() -> None:
    root = Moody().train()
    sample = SampleCall()
    sample.watch(root, "fc")
    root(torch.ones(2, 3))
    assert sample.outputs(root) is None
    assert all(child.training for child in root.modules())


def test_difference_is_the_largest_and_the_euclidean_norm_over_all() -> None:
    one = [torch.tensor([1.0, 2.0]), torch.tensor(3.0), torch.zeros(0)]
    other = [torch.tensor([1.0, 5.0]), torch.tensor(-1.0), torch.zeros(0)]
    assert difference(one, other) == (4.0, 5.0)
    assert difference(one, one) == (0.0, 0.0)


def test_outputs_agree_within_a_share_of_the_effect_or_within_rounding() -> None:
    def judge(output: float, wanted: float, base: float, eps: float = 1e-7, tolerance: float = 0.3) -> bool:
        one = [torch.tensor([value], dtype=torch.float64) for value in (output, wanted, base)]
        return agree(one[:1], one[1:2], one[2:], tolerance=tolerance, eps=eps)

    assert judge(1.2, 1.0, 0.0)
    assert not judge(1.4, 1.0, 0.0)
    assert judge(1.4, 1.0, 0.0, tolerance=math.inf)
    assert judge(1.01, 1.0, 1.0, eps=0.0078)  # no effect to speak of, and an error that bf16 explains
    assert not judge(1.01, 1.0, 1.0)
    assert judge(1.0, 1.0, 1.0, eps=0.0)
    assert not judge(math.nan, 1.0, 0.0)


def test_the_rounding_is_that_of_the_coarsest_dtype_and_of_the_kernels_that_the_user_allowed() -> None:
    assert rounding([torch.float32]) == torch.finfo(torch.float32).eps
    assert rounding([torch.float64]) == torch.finfo(torch.float64).eps
    assert rounding([torch.float32, torch.float16]) == torch.finfo(torch.float16).eps
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert rounding([torch.float32]) == torch.finfo(torch.bfloat16).eps
    finally:
        torch.set_float32_matmul_precision(before)


# What the compiler itself asks of an input that is no leaf, when warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_a_call_inside_compiled_code_is_not_seen_and_breaks_no_graph(root: Root) -> None:
    torch._dynamo.reset()
    root.inner.compile(backend="eager", fullgraph=True)
    sample = SampleCall()
    sample.watch(root, "inner.fc")
    root.training_step(torch.ones(2, 3))
    assert sample.outputs(root) is None


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self(x)


def test_under_a_distributed_strategy_the_root_s_own_call_is_kept_and_not_that_of_the_step() -> None:
    root = Called()
    wrapper = nn.Sequential()
    wrapper.forward = lambda *args: root(*args)  # type: ignore[method-assign]
    sample = SampleCall()
    sample.watch(root, "fc")
    _ForwardRedirection()(wrapper, root, "training_step", torch.ones(2, 3), 0)
    assert sample.name == ""
    outputs = sample.outputs(root)
    assert outputs is not None
    assert outputs[0].shape == (2, 3)
