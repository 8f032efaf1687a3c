"""Isolation of a model that is measured: nothing that a measurement does to it is seen afterwards, or by other ranks.

The candidates themselves are put in place elsewhere, on top of this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.compiled import as_written
from lightning_prune.graph.substitution import named_tensors, substituting_tensors

__all__ = ["undisturbed", "without_other_ranks"]

Forward = Callable[..., Any]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, on copies of its buffers; give the random state back as it was.

    Args:
        model: The model. No gradients are recorded, and what has been compiled runs as it was written.
    """
    tensors = named_tensors(model).values()
    buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
    gpus = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with torch.inference_mode(False), torch.no_grad(), as_written(), torch.random.fork_rng(gpus):
        copies = {id(buffer): buffer.clone() for buffer in buffers}
        with substituting_tensors(model, copies, training=False, wrap_forward=without_other_ranks):
            yield


def without_other_ranks(module: nn.Module, forward: Forward) -> Forward:
    """Return a forward function of a module that does not wait for other ranks, which run other candidates.

    Args:
        module: Any module.
        forward: Its own forward function, which is replaced where normalisation goes across ranks.
    """
    if isinstance(module, nn.SyncBatchNorm):
        return partial(_BatchNorm.forward, module)
    return forward
