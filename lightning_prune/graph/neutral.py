"""Neutral state: the settings of Python, NumPy and PyTorch that a traced forward pass runs under."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional

__all__ = ["neutral_state"]


@contextmanager
def neutral_state() -> Iterator[None]:
    """Run without gradients, fused attention layers and checks of values; give the random state back as it was."""
    with torch.inference_mode(False), torch.no_grad(), _random_state(), _unfused_attention(), _unchecked_batch_sizes():
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _unfused_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _unchecked_batch_sizes() -> Iterator[None]:
    """Do not refuse one value per channel, which has no variance: that does not matter where there are no values."""
    functions = vars(functional)
    check = functions["_verify_batch_size"]
    functions["_verify_batch_size"] = lambda size: None
    try:
        yield
    finally:
        functions["_verify_batch_size"] = check
