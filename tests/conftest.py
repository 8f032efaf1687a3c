"""What all tests share."""

import os
from pathlib import Path

import pytest

# The networks are small, and on a busy machine threads that wait for each other take many times longer; so here, in
# the workers, and in whatever processes the tests start. Before torch is imported, which not all of these need.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Give each core a worker; one file alone is through before workers have started."""
    if len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py"):
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


@pytest.hookimpl(tryfirst=True)  # before the plugin that distributes them reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long runs out unless they are asked for with ``-m long``; say which tests have to share a worker."""
    if "long" not in (config.option.markexpr or ""):
        items[:] = [item for item in items if item.get_closest_marker("long") is None]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with every callback and under every kind of DDP on two ranks, started once; return where they wrote of it.

    Tests that ask for this stand in the group "two ranks", so that one worker runs them all.
    """
    from processes import torchrun
    from two_ranks import CALLBACKS, KINDS, main

    root = tmp_path_factory.mktemp("two_ranks")
    try:
        torchrun(main, root, 1, *KINDS, *CALLBACKS)
    except AssertionError as error:  # what was written before that is still of use
        (root / "error.txt").write_text(str(error))
    return root
