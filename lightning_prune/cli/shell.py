"""A LightningModule around any other module, which is then pruned in the same way, and measured against what it was."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.unlabelled import arguments_of_forward, run_forward

__all__ = ["Shell"]

Measures = dict[str, Tensor]


class Shell(LightningModule):
    """Run a module on what its ``forward`` takes from batches, and validate it.

    What is measured is how far its outputs are from those of before, and for a classifier on pairs of inputs and labels
    the accuracy.

    Args:
        network: The module, trained.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.run_network = _runner(network)
        self.measure = _measurer(network, self.run_network)

    def forward(self, batch: Any) -> Any:
        """Run the module on a batch."""
        return self.run_network(self.network, batch)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Run the module; nothing says what its loss would be."""
        self(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compare its outputs with those of the original module, and with labels."""
        for name, value in self.measure(self(batch), batch).items():
            self.log(name, value)


def _runner(network: nn.Module) -> Callable[[nn.Module, Any], Any]:
    arguments = arguments_of_forward(network)

    def run(network: nn.Module, batch: Any) -> Any:
        return run_forward(network, batch, arguments)

    return run


def _measurer(network: nn.Module, run: Callable[[nn.Module, Any], Any]) -> Callable[[Any, Any], Measures]:
    """Return what measures outputs on a batch; a function, which copies of the module share."""
    original = copy.deepcopy(network).eval()

    def measure(output: Any, batch: Any) -> Measures:
        with torch.no_grad():
            expected = _joined(run(original.to(_device_of(batch)), batch))
        given = _joined(output)
        spread = (expected - expected.mean()).square().mean()
        measured = {"val/error": (given - expected).square().mean() / spread}
        if _is_classified(output, batch):
            measured["val/accuracy"] = (output.argmax(1) == batch[1]).float().mean()
        return measured

    return measure


def _joined(output: Any) -> Tensor:
    """Return all numbers of nested outputs in one row."""
    tensors = [leaf.flatten().float() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("The outputs of the model are no tensors, so that they cannot be compared.")
    return torch.cat(tensors)


def _device_of(batch: Any) -> Any:
    devices = [leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return devices[0] if devices else "cpu"


def _is_classified(output: Any, batch: Any) -> bool:
    """Tell whether outputs are logits, and a batch is inputs with one label for each sample."""
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2
    if not is_pair or not isinstance(output, Tensor) or not isinstance(batch[1], Tensor):
        return False
    labels = batch[1]
    return output.dim() == 2 and labels.dtype == torch.int64 and labels.shape == output.shape[:1]
