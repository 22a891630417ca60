"""Saved and resumed: bitwise as if never stopped, in files that open safely, and never with the state of another."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import AdapterMismatchError
from tests.hazards.test_manual_optimization import Adversarial
from tests.integration.lives import LIGHTNINGS_ADVICE
from tests.integration.process import in_new_process
from tests.optimizer_swap.runs import EPOCHS, LARGE, SMALL, Net, fit, outcome, swap
from tests.states import adapters_of, read, same

pytestmark = [*LIGHTNINGS_ADVICE, pytest.mark.filterwarnings("ignore:optimizer=.paged_:UserWarning")]
SAVED = "epoch=0.ckpt"


def stepped(optimizer: Optimizer, times: int = 1) -> Optimizer:
    for number in range(times):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.sin(torch.arange(parameter.numel()) + number).to(parameter.dtype)
        optimizer.step()
    return optimizer


def optimizer_over(*numels: int, kind: str = "adamw8bit", dtype: torch.dtype = torch.float32) -> Optimizer:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.linspace(-1, 1, numel, dtype=dtype)) for numel in numels], lr=0.1)
    swap(optimizer, kind=kind)
    return optimizer


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [state] if isinstance(state, Tensor) else []


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def opened(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit", "paged_adamw"])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, kind: str, width: int) -> None:
    whole = outcome(tmp_path / "whole", width, kind, "OneCycleLR")
    first = outcome(tmp_path / "parts", width, kind, "OneCycleLR", epochs=1)
    rest = outcome(tmp_path / "parts", width, kind, "OneCycleLR", resume=tmp_path / "parts" / SAVED)
    assert len(first["losses"]) == len(whole["losses"]) / EPOCHS
    assert first["losses"] + rest["losses"] == whole["losses"]
    assert first["settings"] + rest["settings"] == whole["settings"]
    assert same(rest["adapters"], whole["adapters"])
    assert same(rest["optimizer"], whole["optimizer"])


@pytest.mark.slow
def test_a_run_resumed_in_a_new_process_equals_one_that_never_stopped(tmp_path: Path) -> None:
    kind = "paged_adamw8bit"  # the one whose state is restored in two places
    whole = outcome(tmp_path / "whole", LARGE, kind, "OneCycleLR")
    first = outcome(tmp_path / "parts", LARGE, kind, "OneCycleLR", 1)
    resume = tmp_path / "parts" / SAVED
    rest = in_new_process(outcome, tmp_path / "parts", LARGE, kind, "OneCycleLR", EPOCHS, resume)
    assert first["losses"] + rest["losses"] == whole["losses"]
    for key in ("adapters", "optimizer"):
        assert same(rest[key], whole[key])


def test_two_optimizers_stepped_by_hand_resume_bitwise(tmp_path: Path) -> None:
    whole, rest = Adversarial(), Adversarial()
    fit(tmp_path / "whole", whole, "adamw8bit", epochs=2)
    fit(tmp_path / "parts", Adversarial(), "adamw8bit", epochs=1)
    fit(tmp_path / "parts", rest, "adamw8bit", epochs=2, resume=tmp_path / "parts" / SAVED)
    assert same(adapters_of(rest), adapters_of(whole))


def test_a_checkpoint_opens_safely_and_holds_8_bit_moments_of_the_adapters_only(tmp_path: Path) -> None:
    fit(tmp_path, Net(LARGE), "adamw8bit", epochs=1)
    found = read(tmp_path / SAVED)
    (state,) = found["optimizer_states"]
    assert len(state["state"]) == len(found["state_dict"]) == 4
    assert sorted({str(tensor.dtype) for tensor in tensors_of(state)}) == ["torch.float32", "torch.uint8"]
    assert found["lightning_lora"]["optimizers"] == ["AdamW8bit"]


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ("adamw8bit", None, "is of AdamW8bit, the optimizer here is AdamW"),
        (None, "adamw8bit", "is of AdamW, the optimizer here is AdamW8bit"),
        ("paged_adamw", "adamw8bit", "is of PagedAdamW, the optimizer here is AdamW8bit"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_both_names(
    tmp_path: Path, before: Any, after: Any, names: str
) -> None:
    fit(tmp_path, Net(), before, epochs=1)
    with pytest.raises(AdapterMismatchError, match=names):
        fit(tmp_path, Net(), after, epochs=2, resume=tmp_path / SAVED)


def test_the_state_of_torchs_adam_is_refused_also_where_no_manifest_names_it() -> None:
    state = stepped(torch.optim.AdamW([nn.Parameter(torch.ones(8))])).state_dict()
    optimizer = stepped(optimizer_over(8))
    before = optimizer.state_dict()
    with pytest.raises(AdapterMismatchError, match=r"holds 'step', 'exp_avg'.*here is AdamW8bit of bitsandbytes"):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_moments_keep_their_dtypes_whatever_that_of_the_parameters(dtype: torch.dtype) -> None:
    trained, other = stepped(optimizer_over(64, 8192, dtype=dtype), 2), optimizer_over(64, 8192, dtype=dtype)
    other.load_state_dict(opened(saved(trained.state_dict())))
    assert same(other.state_dict(), trained.state_dict())
    small, large = other.state.values()
    assert [small["state1"].dtype, large["state1"].dtype, large["absmax1"].dtype] == [
        torch.float32,
        torch.uint8,
        torch.float32,
    ]


def test_the_state_of_bitsandbytes_own_optimizer_is_exchangeable_with_that_of_a_swapped_one() -> None:
    swapped, theirs = stepped(optimizer_over(64, 8192)), AdamW8bit([nn.Parameter(torch.ones(n)) for n in (64, 8192)])
    theirs.load_state_dict(swapped.state_dict())
    assert same(theirs.state_dict(), swapped.state_dict())
    swapped.load_state_dict(stepped(theirs, 2).state_dict())
    assert same(swapped.state_dict(), theirs.state_dict())


def test_a_file_holds_the_quantile_tables_once_also_after_a_load_that_made_copies() -> None:
    optimizer = stepped(optimizer_over(*[4096] * 50))
    before = saved(optimizer.state_dict())
    tables = {t.data_ptr() for state in optimizer.state.values() for t in (state["qmap1"], state["qmap2"])}
    assert len(tables) == 2
    state = opened(before)
    for entry in state["state"].values():  # as a move to a GPU does
        for values in entry.values():
            if isinstance(values, dict):
                values.update({key: value.clone() for key, value in values.items()})
    assert len(saved(state)) > 1.2 * len(before)
    optimizer.load_state_dict(state)
    assert len(saved(optimizer.state_dict())) == len(before)


@pytest.mark.parametrize("kind", ["paged_adamw8bit", "paged_adamw"])
def test_a_mark_of_paged_memory_that_a_file_kept_is_not_believed(kind: str) -> None:
    """bitsandbytes#782, axolotl#864: the mark is saved, the memory is not, and to prefetch it is an error."""
    trained, other = stepped(optimizer_over(8192, kind=kind)), optimizer_over(8192, kind=kind)
    state = opened(saved(trained.state_dict()))
    for tensor in tensors_of(state["state"]):
        tensor.is_paged, tensor.page_deviceid = True, 0  # type: ignore[attr-defined]
    state = opened(saved(state))
    assert all(tensor.is_paged for tensor in tensors_of(state["state"]))  # type: ignore[attr-defined]
    other.load_state_dict(state)
    other.param_groups[0]["params"][0].data.copy_(trained.param_groups[0]["params"][0])
    assert same(stepped(other).state_dict(), stepped(trained).state_dict())
    assert torch.equal(other.param_groups[0]["params"][0], trained.param_groups[0]["params"][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory is CUDA's")
def test_a_loaded_state_is_paged_again() -> None:
    def on_gpu() -> Optimizer:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.linspace(-1, 1, 200_000, device="cuda"))], lr=0.1)
        swap(optimizer, kind="paged_adamw8bit")
        return optimizer

    def step(optimizer: Optimizer) -> Any:
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer.state[parameter]

    trained, other = on_gpu(), on_gpu()
    step(trained)
    other.load_state_dict(opened(saved(trained.state_dict())))
    expected, state = step(trained), step(other)
    assert state["state1"].is_paged and state["state2"].is_paged
    assert torch.equal(state["state1"].cpu(), expected["state1"].cpu())


def test_8_bit_moments_take_a_quarter_of_the_bytes() -> None:
    wide, narrow = optimizer_over(1 << 20, kind="adamw"), optimizer_over(1 << 20)
    sizes = [sum(t.nbytes for t in tensors_of(stepped(o).state_dict()["state"])) for o in (wide, narrow)]
    assert sizes[1] / sizes[0] == pytest.approx(2.03 / 8, rel=0.01)
