"""A patched method of one object: in force, copied with it, and taken away without a trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.patches import is_patched, original, patch, unpatch
from tests.conftest import TinyModule


class Thing:
    def __init__(self, value: int) -> None:
        self.value = value

    def get(self, factor: int = 1) -> int:
        return self.value * factor


def add(target: Thing, previous: Any, amount: int, *args: Any, **kwargs: Any) -> int:
    result: int = original(target, "get", previous)(*args, **kwargs)
    return result + amount


def double(target: Thing, previous: Any, *args: Any, **kwargs: Any) -> int:
    result: int = original(target, "get", previous)(*args, **kwargs)
    return 2 * result


def noop(target: Any, previous: Any) -> None:
    original(target, "configure_model", previous)()


def test_a_patch_acts_on_one_object_and_passes_arguments_on() -> None:
    thing, other = Thing(3), Thing(3)
    patch(thing, "get", add, 10)
    assert thing.get(2) == 16
    assert thing.get(factor=2) == 16
    assert other.get(2) == 6


def test_a_second_patch_by_the_same_function_does_nothing() -> None:
    thing = Thing(3)
    patch(thing, "get", add, 10)
    patch(thing, "get", add, 100)
    assert thing.get() == 13


def test_taking_it_away_leaves_no_trace() -> None:
    thing = Thing(3)
    before = dict(thing.__dict__)
    patch(thing, "get", add, 10)
    assert is_patched(thing, "get", add)
    unpatch(thing, "get", add)
    assert not is_patched(thing, "get", add)
    assert thing.__dict__ == before
    unpatch(thing, "get", add)
    assert thing.get() == 3


def test_what_the_user_put_on_the_object_is_called_and_comes_back() -> None:
    thing = Thing(3)
    thing.get = lambda factor=1: -factor  # type: ignore[method-assign]
    own = thing.get
    patch(thing, "get", add, 10)
    assert thing.get(2) == 8
    unpatch(thing, "get", add)
    assert thing.get is own


def test_patches_by_two_functions_stack() -> None:
    thing = Thing(3)
    patch(thing, "get", add, 10)
    patch(thing, "get", double)
    assert thing.get() == 26
    unpatch(thing, "get", double)
    assert thing.get() == 13


def test_one_that_is_covered_by_another_is_left_alone() -> None:
    thing = Thing(3)
    patch(thing, "get", add, 10)
    patch(thing, "get", double)
    unpatch(thing, "get", add)
    assert thing.get() == 26


def test_copies_and_pickles_are_bound_to_the_copy() -> None:
    thing = Thing(3)
    patch(thing, "get", add, 10)
    for twin in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
        twin.value = 5
        assert twin.get() == 15
        unpatch(twin, "get", add)
        assert twin.get() == 5
    assert thing.get() == 13


def test_lightning_sees_a_patched_hook_as_overridden() -> None:
    module = TinyModule()
    assert not is_overridden("configure_model", module)
    patch(module, "configure_model", noop)
    assert is_overridden("configure_model", module)
    module.configure_model()
