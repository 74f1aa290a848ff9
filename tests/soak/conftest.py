"""Options of the soak: `pytest tests/soak --soak-seconds 600 --seed 1`."""

from __future__ import annotations

import pytest

SECONDS = 20.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where the folder is named on the command line; else the defaults hold."""
    parser.addoption("--soak-seconds", type=float, default=SECONDS, help="how long a storm rages")
    parser.addoption("--seed", type=int, default=0, help="what decides on the storm")


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """How long each storm is to rage."""
    return float(request.config.getoption("--soak-seconds", SECONDS))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What decides on each storm."""
    return int(request.config.getoption("--seed", 0))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A longer storm may take longer than other tests may."""
    seconds = config.getoption("--soak-seconds", SECONDS)
    for item in items:
        if item.path.name == "test_soak.py":
            item.add_marker(pytest.mark.timeout(seconds + 120))
