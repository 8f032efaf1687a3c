"""Example inputs: what the model is traced with, taken from where it is least trouble."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.callbacks.batches import first_loaders_share, gives_samples, samples

__all__ = ["example_inputs"]


def example_inputs(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", module: str, given: Any, batch_like: dict[str, Any] | None
) -> Any:
    """Return what the module to prune takes.

    Args:
        trainer: The trainer.
        pl_module: The LightningModule.
        module: Dotted name of the submodule to prune, or empty.
        given: What the callback was given, if anything; a list of numbers is the shape of one tensor.
        batch_like: Shape and type of the first batch, if a run that is resumed has looked at it before.

    Raises:
        ValueError: If no example input is to be had.
    """
    if given is not None:
        inputs = torch.zeros(given) if _is_shape(given) else given
    elif module:
        raise ValueError(
            f"example_inputs must be given to prune the submodule {module!r}, since its inputs are not those of the "
            "model."
        )
    elif pl_module.example_input_array is not None:
        inputs = pl_module.example_input_array
    elif batch_like is not None:
        inputs = torch.zeros(batch_like["shape"], dtype=getattr(torch, batch_like["dtype"]))
    else:
        inputs = _first_sample(trainer, pl_module)
    # As Lightning does with batches: the type for precisions such as 64-true, and the device.
    return move_data_to_device(trainer.precision_plugin.convert_input(inputs), pl_module.device)


def _is_shape(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(size, int) for size in given)


def _first_sample(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Tensor:
    """Return the inputs of one sample, or of a batch where the loader has no data set that can be asked for one."""
    loaders, structure = tree_flatten(trainer.train_dataloader)
    with isolate_rng():
        drawn = [_first_of(loader) for loader in loaders]
        # What the model gets: data modules may leave the last steps to the hooks around the transfer to the device.
        moved = trainer.strategy.batch_to_device(tree_unflatten(drawn, structure))
        batch = first_loaders_share(trainer, moved)
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"No example input is to be had from a batch of type {type(batch).__name__}; set example_input_array on "
            f"{type(pl_module).__name__}, or example_inputs on the callback."
        )
    return inputs[:1]


def _first_of(loader: Any) -> Any:
    """Return a batch of the first sample of a loader, or its first batch, or None if there is none."""
    if gives_samples(loader):
        return samples(loader, [0])
    return next(iter([] if loader is None else loader), None)
