"""The low-rank arithmetic against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.functional import low_rank_update, low_rank_weight

IN, OUT, RANK, SCALING = 12, 10, 3, 0.75


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def definition(x: Tensor, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Eq. 3 of the paper, in fp64, written with the dense update."""
    return base.double() + x.double() @ (SCALING * B.double() @ A.double()).T


@pytest.mark.parametrize("leading", [(), (4,), (2, 5), (0,), (2, 3, 4)])
def test_values_are_those_of_the_definition_for_any_leading_shape(leading: tuple[int, ...]) -> None:
    x, base = draw(*leading, IN, seed=1), draw(*leading, OUT, seed=2)
    A, B = draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4)
    output = low_rank_update(x, base, A, B, scaling=SCALING)
    assert output.shape == (*leading, OUT)
    torch.testing.assert_close(output, definition(x, base, A, B), rtol=1e-12, atol=1e-12)


def test_gradients_of_input_base_A_and_B_are_those_of_the_definition() -> None:
    tensors = [
        draw(6, IN, seed=1),
        draw(6, OUT, seed=2),
        draw(RANK, IN, seed=3),
        draw(OUT, RANK, seed=4),
    ]
    weight = draw(6, OUT, seed=5)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    reference = [tensor.clone().requires_grad_() for tensor in tensors]
    (low_rank_update(*ours, scaling=SCALING) * weight).sum().backward()
    (definition(*reference) * weight).sum().backward()
    for got, wanted in zip(ours, reference, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-12, atol=1e-12)


def test_second_derivatives_pass_gradcheck() -> None:
    x, base = draw(2, 3, seed=1).requires_grad_(), draw(2, 4, seed=2).requires_grad_()
    A, B = draw(2, 3, seed=3).requires_grad_(), draw(4, 2, seed=4).requires_grad_()

    def call(*tensors: Tensor) -> Tensor:
        return low_rank_update(*tensors, scaling=SCALING) ** 2

    assert torch.autograd.gradcheck(call, (x, base, A, B))
    assert torch.autograd.gradgradcheck(call, (x, base, A, B))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_low_precision_activations_meet_fp32_adapters_within_rounding(dtype: torch.dtype, tolerance: float) -> None:
    x, base = draw(8, IN, seed=1, dtype=dtype), draw(8, OUT, seed=2, dtype=dtype)
    A = draw(RANK, IN, seed=3, dtype=torch.float32).requires_grad_()
    B = draw(OUT, RANK, seed=4, dtype=torch.float32).requires_grad_()
    output = low_rank_update(x, base, A, B, scaling=SCALING)
    assert output.dtype == dtype
    error = (output.double() - definition(x, base, A, B)).norm() / definition(x, base, A, B).norm()
    assert error < tolerance
    output.float().sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_under_autocast_the_update_runs_in_its_dtype_and_gradients_arrive_in_fp32() -> None:
    x = draw(8, IN, seed=1, dtype=torch.float32)
    A = draw(RANK, IN, seed=3, dtype=torch.float32).requires_grad_()
    B = draw(OUT, RANK, seed=4, dtype=torch.float32).requires_grad_()
    base = torch.zeros(8, OUT, dtype=torch.bfloat16)  # what an autocast nn.Linear hands over
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = low_rank_update(x, base, A, B, scaling=SCALING)
    assert output.dtype == torch.bfloat16
    reference = definition(x, base, A.detach(), B.detach())
    assert (output.double() - reference).norm() / reference.norm() < 2e-2
    output.float().sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_B_leaves_the_base_output_bitwise(dtype: torch.dtype) -> None:
    x, base = draw(8, IN, seed=1, dtype=dtype), draw(8, OUT, seed=2, dtype=dtype)
    output = low_rank_update(x, base, draw(RANK, IN, seed=3).float(), torch.zeros(OUT, RANK), scaling=4.0)
    assert torch.equal(output, base)


def test_the_output_has_the_dtype_of_the_base_output() -> None:
    x, base = draw(8, IN, seed=1, dtype=torch.float32), draw(8, OUT, seed=2, dtype=torch.bfloat16)
    A, B = draw(RANK, IN, seed=3, dtype=torch.float32), draw(OUT, RANK, seed=4, dtype=torch.float32)
    assert low_rank_update(x, base, A, B, scaling=SCALING).dtype == torch.bfloat16


def test_neither_input_nor_base_output_is_changed() -> None:
    x, base = draw(8, IN, seed=1), draw(8, OUT, seed=2)
    before = x.clone(), base.clone()
    low_rank_update(x, base, draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4), scaling=1.0, dropout=0.5, training=True)
    assert torch.equal(x, before[0])
    assert torch.equal(base, before[1])


def test_dropout_zeroes_its_share_of_the_input_and_scales_up_the_rest() -> None:
    torch.manual_seed(0)
    n, p = 4000, 0.3
    identity = torch.eye(n)
    x = torch.ones(1, n)
    passed = low_rank_update(x, torch.zeros(1, n), identity, identity, scaling=1.0, dropout=p, training=True).squeeze()
    kept = passed != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(passed[kept], torch.full_like(passed[kept], 1 / (1 - p)))


def test_dropout_acts_in_training_only() -> None:
    x, base = draw(8, IN, seed=1), draw(8, OUT, seed=2)
    A, B = draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4)
    quiet = low_rank_update(x, base, A, B, scaling=SCALING, dropout=0.5, training=False)
    torch.testing.assert_close(quiet, definition(x, base, A, B), rtol=1e-12, atol=1e-12)
    assert not torch.equal(quiet, low_rank_update(x, base, A, B, scaling=SCALING, dropout=0.5, training=True))


def test_without_dropout_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    low_rank_update(
        draw(8, IN, seed=1),
        draw(8, OUT, seed=2),
        draw(RANK, IN, seed=3),
        draw(OUT, RANK, seed=4),
        scaling=1.0,
        training=True,
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_expectation_is_the_update_without_dropout() -> None:
    torch.manual_seed(0)
    x, base = draw(1, IN, seed=1).float(), torch.zeros(1, OUT)
    A, B = draw(RANK, IN, seed=3).float(), draw(OUT, RANK, seed=4).float()
    many = low_rank_update(x.expand(20000, IN), base.expand(20000, OUT), A, B, scaling=1.0, dropout=0.2, training=True)
    wanted = low_rank_update(x, base, A, B, scaling=1.0).squeeze()
    standard_error = many.std(0) / 20000**0.5
    assert ((many.mean(0) - wanted).abs() < 5 * standard_error).all()


def test_dense_update_is_scaling_times_B_times_A_in_the_dtype_asked_for() -> None:
    A, B = draw(RANK, IN, seed=3), draw(OUT, RANK, seed=4)
    exact = low_rank_weight(A, B, scaling=SCALING, dtype=torch.float64)
    torch.testing.assert_close(exact, SCALING * B @ A, rtol=1e-12, atol=1e-12)
    assert low_rank_weight(A.bfloat16(), B.bfloat16(), scaling=1.0).dtype == torch.float32


def test_dense_update_ignores_autocast() -> None:
    A, B = draw(RANK, IN, seed=3, dtype=torch.float32), draw(OUT, RANK, seed=4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = low_rank_weight(A, B, scaling=SCALING)
    assert torch.equal(inside, low_rank_weight(A, B, scaling=SCALING))
