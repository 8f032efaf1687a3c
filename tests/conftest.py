"""What all tests share."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of long runs, and keep to one thread."""
    # The networks are small, and on a busy machine threads that wait for each other take many times longer.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "zoo: long runs over many networks; only with `-m zoo`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long runs out unless they are asked for."""
    if "zoo" not in (config.option.markexpr or ""):
        items[:] = [item for item in items if item.get_closest_marker("zoo") is None]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
