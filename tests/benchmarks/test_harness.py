"""The harness: interleaving, ratios within rounds, and what it makes of drift, noise and known ratios."""

import gc
import itertools
import random

import pytest
import torch

from benchmarks.harness import Ratio, SelfTest, Timings, interleave, quantile


class SlowingClock:
    """A clock of a machine that gets slower from round to round; steps advance it by their work."""

    def __init__(self, slowdown):
        self.now, self.slowdown, self.steps = 0.0, slowdown, 0

    def __call__(self):
        return self.now

    def step(self, work, each_round):
        def run():
            self.now += work * self.slowdown(self.steps // each_round)
            self.steps += 1

        return run


def test_ratio_is_exact_on_a_machine_that_slows_down_threefold():
    clock = SlowingClock(lambda round_: 1 + 2 * (round_ > 4))
    steps = {"light": clock.step(2.0, 2), "heavy": clock.step(5.0, 2)}
    ratio = interleave(steps, rounds=10, warmup=0, clock=clock).ratio("heavy", to="light")
    assert ratio.median == ratio.lower == ratio.upper == pytest.approx(2.5)
    assert ratio.rounds == 10


def test_one_disturbed_round_does_not_move_the_median():
    timings = Timings({"a": [1.0, 1.0, 1.0, 9.0, 1.0], "b": [2.0, 2.0, 2.0, 2.0, 2.0]})
    assert timings.ratio("a", to="b").median == 0.5
    assert timings.ratio("b", to="a").median == 2.0


def test_variants_are_compared_within_rounds_and_not_by_their_medians():
    timings = Timings({"a": [1.0, 10.0, 4.0], "b": [2.0, 20.0, 2.0]})
    assert timings.median("a") / timings.median("b") == 2.0
    assert timings.ratio("a", to="b").median == 0.5


def test_every_round_runs_every_step_once_and_the_order_varies():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleave(steps, rounds=20, warmup=3)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 23
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 6


def test_warmup_rounds_are_run_but_not_counted():
    ticks = itertools.count()
    timings = interleave({"only": lambda: None}, rounds=3, warmup=4, clock=lambda: next(ticks))
    assert timings.seconds == {"only": [1, 1, 1]}
    assert next(ticks) == 2 * (3 + 4)


def test_the_order_is_reproducible_and_the_global_random_streams_are_left_alone():
    random.seed(7), torch.manual_seed(7)
    expected = random.random(), torch.rand(1).item()
    random.seed(7), torch.manual_seed(7)
    runs = []
    for _ in range(2):
        calls = []
        interleave({name: lambda n=name, c=calls: c.append(n) for name in "abcd"}, rounds=5, seed=3)
        runs.append(calls)
    assert runs[0] == runs[1]
    assert (random.random(), torch.rand(1).item()) == expected


def test_no_garbage_is_collected_inside_a_step_and_collection_is_restored_after_an_error():
    states = []

    def fail():
        states.append(gc.isenabled())
        raise KeyError("step")

    assert gc.isenabled()
    with pytest.raises(KeyError):
        interleave({"failing": fail})
    assert states == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("arguments", [{"steps": {}}, {"rounds": 0}, {"warmup": -1}])
def test_a_measurement_of_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="interleave"):
        interleave(**{"steps": {"a": lambda: None}, **arguments})


@pytest.mark.parametrize(("median", "passed"), [(1.0, True), (0.96, True), (0.94, False), (1.2, False)])
def test_self_test_says_in_words_whether_the_row_can_be_trusted(median, passed):
    result = SelfTest(Ratio(median, median, median, 9), tolerance=0.05)
    assert result.passed is passed
    assert ("do not trust" in str(result)) is not passed
    assert result.to_dict()["passed"] is passed


def test_quantiles_interpolate_between_order_statistics():
    values = [4.0, 1.0, 3.0, 2.0, 10.0]
    expected = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.0, 0.1, 0.25, 0.6, 1.0]).double()
    )
    assert [quantile(values, q) for q in (0.0, 0.1, 0.25, 0.6, 1.0)] == pytest.approx(expected.tolist())


def test_what_comes_before_a_step_is_called_each_time_and_not_timed():
    now, calls = [0.0], []

    def prepare():
        calls.append("prepare")
        now[0] += 100.0

    def step():
        calls.append("step")
        now[0] += 1.0

    timings = interleave({"step": step}, rounds=3, warmup=1, clock=lambda: now[0], before={"step": prepare})
    assert calls == ["prepare", "step"] * 4
    assert timings.seconds == {"step": [1.0, 1.0, 1.0]}
