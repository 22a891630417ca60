"""The runs of each package are made once and shared by the tests on them; everything here is slow, and skips alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wild.life import Life, load_case

HERE = Path(__file__).parent
CASES = ("language", "vision", "time_series", "transformer_series", "graph", "manual_optimization")

collect_ignore_glob = ["cases/*"]  # they import packages that may be absent, and take seconds to import


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # other people's warnings


@pytest.fixture(scope="module", params=CASES)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The life of one foreign LightningModule under the callback; its runs happen when a test first asks for them."""
    return Life(load_case(HERE / "cases" / f"{request.param}.py"), tmp_path_factory.mktemp(request.param))
