"""Tensors without memory behave as tensors of the CPU, as far as shapes, dtypes, sharing and small integers go."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lora.errors import UnsupportedSetupError
from lightning_lora.planning.weightless import WeightlessTensor, without_memory


def weightless(*shape, dtype=torch.float32):
    return WeightlessTensor(torch.empty(shape, dtype=dtype, device="meta"))


def known(value):
    return WeightlessTensor(torch.empty_like(value, device="meta"), value)


def test_a_product_of_a_terabyte_has_its_shape_and_says_it_is_on_the_cpu():
    with without_memory():
        product = weightless(2**19, 2**19) @ weightless(2**19, 4)
    assert (product.shape, product.device.type) == ((2**19, 4), "cpu")


def test_gradients_reach_the_leaves():
    leaf = weightless(4, 8).requires_grad_()
    with without_memory():
        (torch.sigmoid(leaf) * 2).sum().backward()
    assert leaf.grad.shape == (4, 8)


def test_a_view_shares_the_storage_and_an_in_place_operator_returns_its_tensor():
    tensor = weightless(4, 8)
    with without_memory():
        assert tensor.view(8, 4).meta.untyped_storage()._cdata == tensor.meta.untyped_storage()._cdata
        assert tensor.add_(1) is tensor


@pytest.mark.parametrize(
    "change",
    [lambda x: x.t_(), lambda x: x.transpose_(0, 1), lambda x: x.unsqueeze_(0), lambda x: x.resize_(6, 4)],
    ids=["t_", "transpose_", "unsqueeze_", "resize_"],
)
def test_an_in_place_operator_on_the_shape_changes_the_shape_that_the_tensor_says(change):
    tensor, real = weightless(2, 3), torch.empty(2, 3)
    change(real)
    with without_memory():
        change(tensor)
    assert (tensor.shape, tensor.stride()) == (real.shape, real.stride())
    assert (tensor.meta.shape, tensor.meta.stride()) == (real.shape, real.stride())


def test_autocast_of_the_cpu_acts():
    with without_memory(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(weightless(2, 3), weightless(4, 3)).dtype == torch.bfloat16


def test_attention_keeps_no_matrix_of_scores():
    query = weightless(1, 2, 64, 16).requires_grad_()
    with without_memory():
        output = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert "Flash" in type(output.grad_fn).__name__


def test_integers_keep_their_values_through_arithmetic_views_and_changes_in_place():
    with without_memory():
        steps = torch.arange(6)
        steps[2:4] = 7
        assert int(steps.view(2, 3).sum()) == 0 + 1 + 7 + 7 + 4 + 5
        assert bool((known(torch.tensor([3, 4])) > 2).all())


def test_a_known_mask_gives_the_shape_of_what_it_selects():
    labels = known(torch.tensor([1, -100, 2, -100]))
    with without_memory():
        chosen = weightless(4, 8)[labels != -100]
    assert chosen.shape == (2, 8)


def test_a_value_that_only_a_real_run_has_is_refused_where_it_decides():
    with without_memory(), pytest.raises(UnsupportedSetupError, match="values that only a real run has"):
        bool(weightless(3).sum() > 0)
    with without_memory(), pytest.raises(UnsupportedSetupError, match="values that only a real run has"):
        int(weightless(3).argmax())


def test_a_number_that_is_read_alone_is_nan():
    with without_memory():
        assert math.isnan(weightless(3).sum().item())


def test_a_sampled_integer_is_not_known():
    with without_memory(), pytest.raises(UnsupportedSetupError):
        int(torch.randint(0, 10, ()))


def test_the_random_stream_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with without_memory():
        F.dropout(weightless(4, 4), 0.5)
        torch.randint(0, 10, (3,))
    assert torch.equal(before, torch.get_rng_state())
