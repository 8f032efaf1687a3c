"""Example inputs: what the model is traced with, taken from where it is least trouble."""

import inspect
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_prune.callbacks.batches import first_loaders_share
from lightning_prune.callbacks.descriptions import like
from lightning_prune.callbacks.rehearsal import Rehearsal
from lightning_prune.graph.entry import Step
from lightning_prune.graph.nested import nested_tensors, plainly, with_tensors
from lightning_prune.graph.run import submodule_of
from lightning_prune.graph.steps import first_call
from lightning_prune.unlabelled import forward_arguments

__all__ = ["example_inputs"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def example_inputs(rehearsal: Rehearsal, module: str, given: Any, batch_like: dict[str, Any] | None) -> Any:
    """Return what the module to prune takes.

    Args:
        rehearsal: The steps of the LightningModule.
        module: Dotted name of the submodule to prune, or empty.
        given: What the callback was given, if anything; a list of numbers is the shape of one tensor.
        batch_like: What the inputs are like, if a run that is resumed has looked at a batch before.

    Raises:
        ValueError: If no example input is to be had.
    """
    trainer, pl_module = rehearsal.trainer, rehearsal.pl_module
    if given is not None:
        inputs = torch.zeros(given) if _is_shape(given) else given
    elif not module and pl_module.example_input_array is not None:
        inputs = pl_module.example_input_array
    elif batch_like is not None:
        inputs = like(batch_like)
    else:
        return _really_given(rehearsal, module)
    # As Lightning does with batches: the type for precisions such as 64-true, and the device.
    return move_data_to_device(trainer.precision_plugin.convert_input(inputs), pl_module.device)


def _is_shape(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(size, int) for size in given)


def _really_given(rehearsal: Rehearsal, module: str) -> Any:
    """Return what a submodule is given when the model trains, or when it is measured."""
    pl_module = rehearsal.pl_module
    submodule = submodule_of(pl_module, module)
    for step in rehearsal.first_steps():
        call = _first_call(pl_module, [module], step)
        if call is not None and list(nested_tensors(call)):
            return _one_sample(as_inputs(submodule, plainly(call)))
    if module:
        raise ValueError(
            f"No example input of {module!r} is to be had, as neither training_step nor validation_step calls it on a "
            "batch; give the callback example_inputs, what its forward takes."
        )
    return _of_forward(rehearsal) if _has_forward(pl_module) else rehearsal.entry()


def _has_forward(pl_module: "pl.LightningModule") -> bool:
    return type(pl_module).forward is not pl.LightningModule.forward or "forward" in vars(pl_module)


def _of_forward(rehearsal: Rehearsal) -> Any:
    """Return what the ``forward`` of a model takes whose steps do not call it, but perhaps what it calls."""
    pl_module = rehearsal.pl_module
    parts = [name for name, _ in pl_module.named_children()]
    for step in rehearsal.first_steps():
        batch = first_loaders_share(rehearsal.trainer, step.args[0])
        args, kwargs = forward_arguments(pl_module, batch)
        calls = [(args, kwargs), _first_call(pl_module, parts, step)]
        for call in calls:
            if call is not None and rehearsal.forward_takes(call):
                return _one_sample(as_inputs(pl_module, plainly(call)))
    return rehearsal.entry()


def _first_call(pl_module: "pl.LightningModule", modules: list[str], step: Step) -> Call | None:
    try:
        return first_call(pl_module, modules, step)
    except Exception:  # of a step that does not work on this batch
        return None


def as_inputs(module: nn.Module, call: Call) -> Any:
    """Return a call of a module as example inputs: a tensor, a tuple of them, or a dictionary of named ones.

    Args:
        module: The module.
        call: The positional and the named arguments.
    """
    args, kwargs = call
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _one_sample(inputs: Any) -> Any:
    """Return the first sample of inputs that are a batch, where all tensors have as many; costs are counted for it."""
    tensors = list(nested_tensors(inputs))
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if isinstance(inputs, Tensor) or (len(lengths) == 1 and len(tensors) > 1):
        return with_tensors(inputs, lambda tensor: tensor[:1])
    return inputs
