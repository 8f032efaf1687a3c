"""What all tests share."""

import pytest
import torch


def pytest_configure() -> None:
    """Keep to one thread."""
    # The networks are small, and on a busy machine threads that wait for each other take many times longer.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long runs out unless they are asked for with ``-m long``."""
    if "long" not in (config.option.markexpr or ""):
        items[:] = [item for item in items if item.get_closest_marker("long") is None]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
