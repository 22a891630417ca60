"""The search finds the largest number that fits, in few evaluations."""

import pytest

from lightning_lora.planning.search import largest_that_fits

COSTS = {
    "affine": lambda n: 1000 + 37 * n,
    "quadratic": lambda n: 10 * n + 3 * n * n,
    "with a floor": lambda n: max(5000, 20 * n),
    "in steps": lambda n: 100 * ((n + 7) // 8),
    "flat": lambda n: 10,
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("limit", [9, 10, 1037, 5000, 5001, 77_777, 10**6])
def test_the_answer_fits_and_the_next_does_not(name, limit):
    cost = COSTS[name]
    found = largest_that_fits(cost, limit, highest=4096)
    assert found == 0 or cost(found) <= limit
    assert found == 4096 or cost(found + 1) > limit


def test_an_affine_cost_takes_few_evaluations():
    seen = []

    def cost(n):
        seen.append(n)
        return 10**9 + 123_457 * n

    assert largest_that_fits(cost, 10**10) == (10**10 - 10**9) // 123_457
    assert len(seen) <= 6
