"""A line about what takes long."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from lightning.pytorch.utilities.rank_zero import rank_zero_info

__all__ = ["announce"]


@contextmanager
def announce(work: str, seconds: float = 1.0) -> Iterator[None]:
    """Say what is being done, on the first rank, once it has taken some time.

    Args:
        work: What is being done, as in ``"Tracing ResNet"``.
        seconds: How long nothing is said.
    """
    timer = Timer(seconds, rank_zero_info, [f"{work} ..."])
    timer.daemon = True  # never keeps a process alive
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
