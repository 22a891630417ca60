"""Compare callables by interleaved rounds in one process.

Machines are shared and slow down for seconds at a time, so seconds measured one variant after another say
little. Here every round runs every variant once, in a random order, and what is reported is the median of the
ratios *within* rounds: whatever slows a whole round cancels.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

Step = Callable[[], object]
Clock = Callable[[], float]

CLOCKS: dict[str, Clock] = {
    # CPU time leaves out the time in which other jobs had the core: right for one thread.
    "cpu": time.process_time,
    # With several threads CPU time adds up their waiting at barriers, so wall time is the one to read.
    "wall": time.perf_counter,
}


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the per-round ratios of one variant to another; below 1 is faster."""

    median: float
    lower: float
    upper: float
    rounds: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.lower:.3f}-{self.upper:.3f}]"


@dataclass(frozen=True)
class SelfTest:
    """The ratio of a variant to its own twin, which is 1 in a harness that can be trusted."""

    ratio: Ratio
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.ratio.median - 1.0) <= self.tolerance

    def to_dict(self) -> dict[str, float | bool]:
        return {**self.ratio.to_dict(), "tolerance": self.tolerance, "passed": self.passed}

    def __str__(self) -> str:
        verdict = "ok" if self.passed else f"NOT within {self.tolerance:.0%} of 1: do not trust this row"
        return f"{self.ratio} {verdict}"


@dataclass(frozen=True)
class Timings:
    """Seconds of each variant in each round: ``seconds[name][round]``."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one variant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, *, to: str) -> Ratio:
        """Compare two variants round by round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        return Ratio(statistics.median(ratios), quantile(ratios, 0.25), quantile(ratios, 0.75), len(ratios))

    def self_test(self, name: str, *, twin: str, tolerance: float = 0.05) -> SelfTest:
        """Compare a variant with its twin (the same thing, built twice)."""
        return SelfTest(self.ratio(name, to=twin), tolerance)


def interleave(
    steps: Mapping[str, Step],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Clock = time.process_time,
    seed: int = 0,
    before: Mapping[str, Step] | None = None,
) -> Timings:
    """Time every step once a round, in an order drawn anew for each round.

    Args:
        steps: What to time, by name. Each is called with no arguments.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
        clock: Seconds; see ``CLOCKS``.
        seed: Of the order only. The global random streams are left alone.
        before: What is called before a step and is not timed, by the step's name.

    Returns:
        The seconds of every variant in every counted round.

    Raises:
        ValueError: If there is nothing to time or fewer than one round.
    """
    if not steps:
        raise ValueError("interleave: steps is empty, pass at least one named callable")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"interleave: rounds={rounds}, warmup={warmup}; need rounds >= 1 and warmup >= 0")
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with garbage_collection_paused():
        for index in range(warmup + rounds):
            gc.collect()
            for name in order.sample(list(steps), len(steps)):
                if before is not None and name in before:
                    before[name]()
                elapsed = time_once(steps[name], clock)
                if index >= warmup:
                    seconds[name].append(elapsed)
    return Timings(seconds)


def time_once(step: Step, clock: Clock) -> float:
    """Seconds of one call."""
    start = clock()
    step()
    return clock() - start


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No automatic collection; what is alive now is set aside, so that a collection by hand is cheap.

    Walking the million objects of torch and transformers before each round would also empty the caches.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def spread(ratio: Mapping[str, float]) -> str:
    """The plain form of a :class:`Ratio` for a table."""
    return f"{ratio['median']:.3f} [{ratio['lower']:.2f}-{ratio['upper']:.2f}]"


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the order statistics, as numpy does by default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * fraction
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
