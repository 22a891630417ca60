"""Swapping a class in place changes behaviour and nothing else."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.class_swap import SwappedClass, original_class, restore_class, swap_class, swapped_parents


class Louder(SwappedClass):
    class_prefix = "Loud"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 10 * super().forward(*args, **kwargs)


class OwnLinear(nn.Linear):
    """A user's subclass with state of its own."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.note = {"mine": [1, 2]}
        self.register_buffer("seen", torch.zeros(1))


@pytest.fixture(params=[lambda: nn.Linear(3, 3), lambda: OwnLinear(3)], ids=["torch", "user"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    built = request.param()
    assert isinstance(built, nn.Module)
    return built


def test_the_mixin_acts_and_restoring_takes_it_away(layer: nn.Module) -> None:
    x = torch.randn(2, 3)
    before = layer(x)
    swap_class(layer, Louder)
    assert torch.equal(layer(x), 10 * before)
    restore_class(layer)
    assert torch.equal(layer(x), before)


def test_the_object_stays_an_instance_of_its_own_class(layer: nn.Module) -> None:
    own = type(layer)
    swap_class(layer, Louder)
    assert isinstance(layer, own)
    assert isinstance(layer, Louder)
    assert original_class(layer) is own
    assert swapped_parents(type(layer)) == (Louder, own)
    restore_class(layer)
    assert type(layer) is own
    assert original_class(layer) is own


def test_nothing_in_the_object_changes(layer: nn.Module) -> None:
    contents = dict(layer.__dict__)
    swap_class(layer, Louder)
    assert layer.__dict__ == contents
    assert all(layer.__dict__[key] is value for key, value in contents.items())


def test_the_printed_name_tells_of_the_swap(layer: nn.Module) -> None:
    name = type(layer).__name__
    swap_class(layer, Louder)
    assert type(layer).__name__ == f"Loud{name}"


def test_swapping_twice_the_same_class_gives_one_type() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    swap_class(first, Louder)
    swap_class(second, Louder)
    assert type(first) is type(second)


def test_hooks_registered_before_see_the_swapped_output(layer: nn.Module) -> None:
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    swap_class(layer, Louder)
    output = layer(torch.randn(2, 3))
    assert torch.equal(seen[0], output)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_rebuilds_an_independent_swapped_object(layer: nn.Module, protocol: int) -> None:
    swap_class(layer, Louder)
    twin = pickle.loads(pickle.dumps(layer, protocol=protocol))
    x = torch.randn(2, 3)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.weight is not layer.weight
    restore_class(twin)
    assert isinstance(layer, Louder)


def test_torch_save_of_the_whole_object_makes_the_round_trip(layer: nn.Module) -> None:
    swap_class(layer, Louder)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), layer(x))


def test_a_deepcopy_is_independent(layer: nn.Module) -> None:
    swap_class(layer, Louder)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.add_(1.0)
    x = torch.randn(2, 3)
    assert type(twin) is type(layer)
    assert not torch.equal(twin(x), layer(x))
    if isinstance(layer, OwnLinear):
        assert twin.note == layer.note
        assert twin.note is not layer.note


def test_state_dict_keys_are_those_of_the_original(layer: nn.Module) -> None:
    keys = list(layer.state_dict())
    swap_class(layer, Louder)
    assert list(layer.state_dict()) == keys


class Halved:
    """Somebody else's mixin, put in front of a swapped class."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * super().forward(*args, **kwargs)  # type: ignore[misc,no-any-return]


def test_a_class_derived_from_a_swapped_one_copies_and_is_left_derived_from_the_original(layer: nn.Module) -> None:
    own, x = type(layer), torch.randn(2, 3)
    before = layer(x)
    swap_class(layer, Louder)
    layer.__class__ = type("Mixed", (Halved, type(layer)), {})
    assert original_class(layer) is own
    assert torch.equal(copy.deepcopy(layer)(x), 0.5 * (10 * before))
    restore_class(layer)
    assert type(layer).__bases__ == (Halved, own) and type(layer).__name__ == "Mixed"
    assert torch.equal(layer(x), 0.5 * before)
