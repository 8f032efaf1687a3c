"""Neutral state: the settings of Python, NumPy and PyTorch that a traced forward pass runs under."""

import gc
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_prune.graph.substitution import named_tensors

__all__ = ["neutral_state", "preserving_random_state", "unfused_attention", "unsearched_memory"]


@contextmanager
def neutral_state(model: nn.Module) -> Iterator[None]:
    """Run without gradients, fused layers and checks of values; give the random state back as it was.

    Args:
        model: What is run.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserving_random_state(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others are not for all widths of heads
        for neutral in (unfused_attention, _unfused_layers, _unchecked_batch_sizes, unsearched_memory):
            stack.enter_context(neutral())
        yield


@contextmanager
def preserving_random_state(model: nn.Module) -> Iterator[None]:
    """Give the random state of Python, of NumPy, and of PyTorch on the devices of a model back as it was.

    Args:
        model: What is run.
    """
    tensors = named_tensors(model).values() if torch.cuda.is_initialized() else ()
    gpus = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    try:
        with torch.random.fork_rng(sorted(gpus)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Let attention layers run as the operators that they are made of."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _unfused_layers() -> Iterator[None]:
    """Let recurrent layers run as the operators that they are made of, also on data."""
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, was_enabled in zip(libraries, enabled, strict=True):
            library.enabled = was_enabled


@contextmanager
def unsearched_memory() -> Iterator[None]:
    """Do not search for objects that only refer to each other, which takes as long as the pass that creates them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
