"""The fused linear layer computes what its definition in torch's own operations does, in every derivative."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_lora.fused.draw import draw_dropout
from lightning_lora.fused.dropout import Dropout, MaskedDropout, Pull
from lightning_lora.fused.linear import Frozen, lora_linear, reference
from lightning_lora.fused.products import Update
from lightning_lora.fused.rare_dropout import RareDropout

IN, OUT, RANK, SCALING = 24, 40, 4, 1.5
SHAPES = [(), (5,), (2, 3), (2, 3, 4), (0,), (3, 0), (1,)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pieces(dtype: torch.dtype, *, bias: bool = True, coded: bool = False) -> tuple[Frozen, Tensor, Tensor]:
    """A frozen part and a trained pair; ``coded`` makes the weight anew for each product."""
    weight = draw(OUT, IN, seed=1, dtype=dtype)
    own = torch.promote_types(torch.float32, dtype)
    lora_A = draw(RANK, IN, seed=2, dtype=own).requires_grad_()
    lora_B = draw(OUT, RANK, seed=3, dtype=own).requires_grad_()
    frozen = Frozen(
        (lambda wanted: weight.to(wanted)) if coded else weight, draw(OUT, seed=4, dtype=dtype) if bias else None
    )
    return frozen, lora_A, lora_B


def values_and_gradients(function, x, frozen, lora_A, lora_B, **options):
    x = x.detach().requires_grad_()
    lora_A.grad = lora_B.grad = None
    output = function(x, frozen, lora_A, lora_B, scaling=SCALING, **options)
    (output * draw(*output.shape, seed=9).to(output.dtype)).sum().backward()
    return output.detach(), x.grad, lora_A.grad, lora_B.grad


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "coded"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_definition(dtype, tolerance, shape, bias, coded):
    frozen, lora_A, lora_B = pieces(dtype, bias=bias, coded=coded)
    x = draw(*shape, IN, seed=5, dtype=dtype)
    ours = values_and_gradients(lora_linear, x, frozen, lora_A, lora_B)
    expected = values_and_gradients(reference, x, frozen, lora_A, lora_B)
    for got, wanted in zip(ours, expected):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * IN)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_definition_with_the_same_mask(shape, dropout):
    frozen, lora_A, lora_B = pieces(torch.float64)
    x = draw(*shape, IN, seed=5)
    torch.manual_seed(0)
    ours = values_and_gradients(lora_linear, x, frozen, lora_A, lora_B, dropout=dropout)
    torch.manual_seed(0)
    drop = draw_dropout(dropout, like=x)
    for got, wanted in zip(ours, values_and_gradients(reference, x, frozen, lora_A, lora_B, drop=drop)):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_inputs_and_gradients_that_are_not_contiguous():
    frozen, lora_A, lora_B = pieces(torch.float64)
    wide = draw(6, 5, IN, seed=5)
    for x in (wide.transpose(0, 1), wide[:, ::2], wide[..., :1].expand(6, 5, IN)):
        ours = values_and_gradients(lora_linear, x, frozen, lora_A, lora_B)
        expected = values_and_gradients(reference, x, frozen, lora_A, lora_B)
        for got, wanted in zip(ours, expected):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    x = wide.clone().requires_grad_()
    lora_linear(x, frozen, lora_A, lora_B, scaling=SCALING).sum().backward()  # a gradient with strides of zero
    torch.testing.assert_close(x.grad, (frozen.weight + SCALING * lora_B @ lora_A).sum(0).expand_as(x).detach())


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
def test_first_and_second_derivatives_pass_gradcheck(dropout):
    frozen, lora_A, lora_B = pieces(torch.float64)
    x = draw(3, IN, seed=5).requires_grad_()

    def call(*tensors):
        torch.manual_seed(0)
        return lora_linear(tensors[0], frozen, *tensors[1:], scaling=SCALING, dropout=dropout) ** 2

    assert torch.autograd.gradcheck(call, (x, lora_A, lora_B))
    assert torch.autograd.gradgradcheck(call, (x, lora_A, lora_B))


def test_a_second_derivative_that_needs_an_input_that_was_not_kept_is_refused():
    frozen, lora_A, lora_B = pieces(torch.float64)
    x = draw(3, IN, seed=5).requires_grad_()
    output = lora_linear(x, frozen, lora_A.requires_grad_(False), lora_B, scaling=SCALING)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


def test_the_weight_that_a_node_saves_is_left_to_the_hooks_that_move_it():
    _, lora_A, lora_B = pieces(torch.float64)
    weight = draw(OUT, IN, seed=1)
    alive = weakref.ref(weight)
    x = draw(3, IN, seed=5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.tolist(), torch.tensor):
        output = lora_linear(x, Frozen(weight, None), lora_A, lora_B, scaling=SCALING)
    del weight
    assert output.grad_fn is not None and alive() is None


def test_a_factor_that_is_made_in_inference_mode_has_no_version():
    frozen, lora_A, lora_B = pieces(torch.float32)
    x = draw(3, IN, seed=5, dtype=torch.float32)
    with torch.inference_mode():
        made = lora_A * 1.0
        found = lora_linear(x, frozen, made, lora_B, scaling=SCALING)
    torch.testing.assert_close(found, reference(x, frozen, lora_A, lora_B, scaling=SCALING).detach())


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_that_are_needed_are_made(needs):
    frozen, lora_A, lora_B = pieces(torch.float64)
    tensors = [
        tensor.detach().requires_grad_(needed) for tensor, needed in zip((draw(3, IN, seed=5), lora_A, lora_B), needs)
    ]
    lora_linear(tensors[0], frozen, *tensors[1:], scaling=SCALING).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(needs)


def test_nothing_but_the_input_and_its_product_with_A_are_kept_for_the_backward_pass():
    frozen, lora_A, lora_B = pieces(torch.bfloat16)
    x = draw(7, IN, seed=5, dtype=torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(x, frozen, lora_A, lora_B, scaling=SCALING, dropout=0.5)
    own = {t.untyped_storage().data_ptr() for t in (x, frozen.weight, lora_A, lora_B)}
    assert [t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own] == [2 * RANK * 7]


def test_without_gradients_to_A_the_input_is_not_kept():
    frozen, lora_A, lora_B = pieces(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = draw(7, IN, seed=5, dtype=torch.float32).requires_grad_()
        lora_linear(x, frozen, lora_A.requires_grad_(False), lora_B, scaling=SCALING)
    assert not any(tensor.shape == x.shape for tensor in kept)


def test_gradients_of_A_and_B_are_fp32_whatever_the_product_is_in():
    frozen, lora_A, lora_B = pieces(torch.bfloat16)
    x = draw(7, IN, seed=5, dtype=torch.bfloat16)
    output = lora_linear(x, frozen, lora_A, lora_B, scaling=SCALING)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert (lora_A.grad.dtype, lora_B.grad.dtype) == (torch.float32, torch.float32)


def test_a_small_update_survives_the_rounding_of_a_bf16_output():
    """Added onto the rounded product of the base, it is lost where it is below half a unit in the last place."""
    weight, lora_A, lora_B = draw(256, 256, seed=1), draw(8, 256, seed=2), draw(256, 8, seed=3)
    lora_B *= 1e-3 * weight.norm() / (lora_B @ lora_A).norm()
    x = draw(512, 256, seed=4).bfloat16()
    frozen = Frozen(weight.bfloat16(), None)
    update = x.double() @ (lora_B @ lora_A).T

    def share(function):
        adapted = function(x, frozen, lora_A.float(), lora_B.float(), scaling=1.0).double()
        base = torch.nn.functional.linear(x, frozen.weight).double()
        return float(((adapted - base) * update).sum() / (update * update).sum())

    assert share(lora_linear) == pytest.approx(1.0, abs=0.05)
    assert share(reference) < 0.8


@pytest.mark.parametrize("dropout", [0.05, 0.3])
def test_a_recomputed_layer_draws_the_same_mask(dropout):
    frozen, lora_A, lora_B = pieces(torch.float64)
    for reentrant in (False, True):
        x = draw(9, IN, seed=5).requires_grad_()
        found = []
        for recompute in (False, True):
            torch.manual_seed(3)
            x.grad = lora_A.grad = lora_B.grad = None

            def layer(x):
                return lora_linear(x, frozen, lora_A, lora_B, scaling=SCALING, dropout=dropout)

            output = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
            output.square().sum().backward()
            found.append([output.detach(), x.grad, lora_A.grad, lora_B.grad])
        assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_share_that_was_asked_for(probability):
    torch.manual_seed(0)
    shares, means = [], []
    for _ in range(200):
        ones = torch.ones(5000)
        drop = draw_dropout(probability, like=ones)
        kept = drop.keep(ones)
        assert set(kept.unique().tolist()) <= {0.0, 1.0}
        shares.append(1 - kept.mean())
        means.append(kept.mean() * drop.scale)
    assert float(torch.stack(shares).mean()) == pytest.approx(probability, abs=0.003)
    assert float(torch.stack(means).mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_is_independent_of_the_dtype_and_of_its_neighbours(dtype):
    drop = MaskedDropout(seed=5, dropped=128)
    mask = drop.keep(torch.ones(64, 63, dtype=dtype)).double()
    assert torch.equal(mask, drop.keep(torch.ones(64, 63)).double())
    ones = torch.ones(64, 63, dtype=dtype)
    assert torch.equal(mask, drop.mask(ones.shape, ones).keep_(ones).double()) and torch.equal(mask, ones.double())
    centred = mask.flatten() - mask.mean()
    for lag in (1, 7, 8, 63):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(float(correlation)) < 0.06


def test_dropped_values_are_zero_also_where_the_input_is_not_finite():
    drop = MaskedDropout(seed=1, dropped=254)
    kept = drop.keep(torch.full((1000,), float("nan")))
    assert int(kept.isnan().sum()) < 50 and bool((kept[~kept.isnan()] == 0).all())


def test_places_that_are_drawn_make_the_mask_that_each_product_drops_by():
    drop, x = RareDropout(0.1, seed=3), draw(64, 33, seed=1)
    small_A, inner, gathered = draw(5, 33, seed=2), draw(64, 5, seed=3), draw(64, 33, seed=4)
    kept = drop.mask(x.shape, x).keep(torch.ones_like(x))
    assert torch.equal(drop.keep(x), x * kept)
    for strided in (x, draw(33, 64, seed=1).t(), draw(64, 66, seed=1)[:, ::2]):
        torch.testing.assert_close(drop.project(strided, small_A, 1.5), 1.5 * (strided * kept) @ small_A.T)
        for given in (None, gathered):
            begun = None if given is None else given.clone()
            found = drop.pull_back(Pull(Update(inner, small_A, 1.5), strided, factor_A=2.5, gathered=begun))
            added = 1.5 * (inner @ small_A) * kept
            torch.testing.assert_close(found[0], 2.5 * inner.T @ (strided * kept))
            torch.testing.assert_close(found[1], added if given is None else given + added)


def test_places_are_dropped_independently_of_each_other_with_the_exact_probability():
    dropped = torch.zeros(300, 211, dtype=torch.float64)
    for seed in range(400):
        dropped += 1 - RareDropout(0.07, seed).keep(torch.ones(300, 211))
    trials = 400 * dropped.numel()
    assert float(dropped.sum()) / trials == pytest.approx(0.07, abs=4 * (0.07 * 0.93 / trials) ** 0.5)
    # Of a binomial number for each place, not of draws that leave each other out.
    assert float(dropped.var()) == pytest.approx(400 * 0.07 * 0.93, rel=0.03)
    rows = dropped.sum(1)
    assert float(rows.var()) == pytest.approx(211 * 400 * 0.07 * 0.93, rel=0.35)
    assert abs(float(dropped[:150].mean() - dropped[150:].mean())) < 0.2


def test_few_values_are_dropped_by_their_places_on_a_cpu():
    x = torch.ones(4, 4)
    kinds = [type(draw_dropout(probability, like=x)) for probability in (0.0, 0.05, 0.07, 0.1)]
    assert kinds == [Dropout, RareDropout, RareDropout, MaskedDropout]
    assert type(draw_dropout(0.05, like=x.to("meta"))) is MaskedDropout
