"""What all tests share."""

import os

import pytest

# The networks are small, and on a busy machine threads that wait for each other take many times longer; so here, in
# the workers, and in whatever processes the tests start. Before torch is imported, which not all of these need.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Give each core a worker; one file alone is through before workers have started."""
    if len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py"):
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long runs out unless they are asked for with ``-m long``."""
    if "long" not in (config.option.markexpr or ""):
        items[:] = [item for item in items if item.get_closest_marker("long") is None]


@pytest.fixture(scope="session", autouse=True)
def _autograd_has_started() -> None:
    """Let autograd look for devices before an export registers some of its own: forks could not run backward then."""
    import torch

    torch.zeros(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _trainers_write_elsewhere(request: pytest.FixtureRequest) -> None:
    """Let Trainers that the tests of callbacks tell of no folder write where nothing is to be kept."""
    if request.path.parent.name == "callbacks":
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
