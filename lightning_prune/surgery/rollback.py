"""Going back: a model, its optimizers and what follows it get the shapes and the values they had before a prune.

A snapshot is plain values and tensors on the CPU, so that a checkpoint can hold it.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery.pruning import Follower, check, of_record
from lightning_prune.surgery.replacing import Replacement, in_place, of_tensor

__all__ = ["Snapshot", "snapshot_of", "went_back"]

Snapshot = dict[str, Any]
Named = Mapping[str, Tensor]


def snapshot_of(
    model: nn.Module, optimizers: Iterable[Any], copies: Sequence[nn.Module] = (), followers: Sequence[Follower] = ()
) -> Snapshot:
    """Return what a model, its optimizers and what follows it are now.

    Args:
        model: The model.
        optimizers: The optimizers that train it.
        copies: Copies of the model, such as averages of its weights.
        followers: Tensors elsewhere that follow those of the model.
    """
    plan = plan_in_force(model)
    return {
        "plan": plan.to_json() if plan is not None else None,
        "models": [_copied(named_tensors(each)) for each in (model, *copies)],
        "followers": [_copied(follower.tensors) for follower in followers],
        "optimizers": [_state_of(optimizer) for optimizer in check(model, optimizers)],
    }


@contextmanager
def went_back(
    model: nn.Module,
    snapshot: Snapshot,
    optimizers: Iterable[Any],
    copies: Sequence[nn.Module] = (),
    followers: Sequence[Follower] = (),
) -> Iterator[PruningPlan | None]:
    """Go back to a snapshot, for a block and for good; if anything is raised in it, nothing has changed.

    Parameters keep their identity. Learning rates and other settings of optimizers stay as they are: schedules go by
    the epoch.

    Args:
        model: The model.
        snapshot: What `snapshot_of` has returned for the same things, in this process or in the one of a checkpoint.
        optimizers: The optimizers that train the model.
        copies: Copies of the model, such as averages of its weights.
        followers: Tensors elsewhere that follow those of the model.

    Yields:
        The plan that is in force then; None for the original network.
    """
    plan = None
    if snapshot["plan"] is not None:
        plan = PruningPlan.from_json(snapshot["plan"])
    replacements: list[Replacement] = []
    models = [model, *copies]
    for each, values in zip(models, snapshot["models"], strict=True):
        tensors = named_tensors(each)
        replacements.extend(_values(tensors, values))
        replacements.append(of_record(each, plan, tensors.values()))
    for follower, values in zip(followers, snapshot["followers"], strict=True):
        tensors = dict(follower.tensors)
        replacements.extend(_values(tensors, values))
        if follower.module is not None:
            replacements.append(follower.sizes(tensors.values()))
    found = check(model, optimizers)
    for optimizer, states in zip(found, snapshot["optimizers"], strict=True):
        replacements.append(_of_state(optimizer, states))
    with in_place(replacements):
        yield plan


def _copied(tensors: Named) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _values(tensors: Named, values: Named) -> Iterator[Replacement]:
    """Make what is put in place of the values of tensors; gradients of another network are dropped."""
    for name, tensor in tensors.items():
        value = values[name].to(tensor.device, tensor.dtype, copy=True)
        yield of_tensor(tensor, value, None)


# -- optimizers --------------------------------------------------------------------------------------------------------


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def _state_of(optimizer: Optimizer) -> list[dict[Any, Any]]:
    """Return a copy of what an optimizer keeps of each parameter, in their order."""
    states = []
    for parameter in _parameters(optimizer):
        state = optimizer.state.get(parameter, {})
        values = {key: tree_map(_apart, value) for key, value in state.items()}
        states.append(values)
    return states


def _apart(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def _of_state(optimizer: Optimizer, states: Sequence[Mapping[Any, Any]]) -> Replacement:
    """Make what is put in place of the state of an optimizer."""
    before = dict(optimizer.state)
    after = dict(before)
    parameters = _parameters(optimizer)
    for parameter, state in zip(parameters, states, strict=True):
        now = after.pop(parameter, {})
        if not state:
            continue
        after[parameter] = {key: _beside(value, now.get(key), parameter) for key, value in state.items()}
    put = partial(_refill, optimizer.state, after)
    undo = partial(_refill, optimizer.state, before)
    return Replacement(put, undo)


def _beside(value: Any, now: Any, parameter: Tensor) -> Any:
    """Return a copy of a state on the device where the optimizer has it."""
    device = torch.device("cpu")
    if isinstance(now, Tensor):
        device = now.device
    elif isinstance(value, Tensor) and value.dim():
        device = parameter.device
    return tree_map(lambda leaf: _placed(leaf, device), value)


def _placed(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(device, copy=True)
    return copy.deepcopy(leaf)


def _refill(state: Any, content: Mapping[Any, Any]) -> None:
    state.clear()
    state.update(content)
