"""The only place that replaces tensors: parameters, buffers, gradients and optimizer state."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.sizes import sync_attributes
from lightning_prune.graph.substitution import named_tensors, owning_modules
from lightning_prune.pruning_plan import PruningPlan, plan_in_force, record_plan

__all__ = ["PruneReport", "check", "prune", "pruned_tensors", "reshape"]

_LARGE = 1_000_000  # numbers in a tensor from which it is copied in parts, and looking for runs pays


@dataclass(frozen=True)
class PruneReport:
    """What a prune changed.

    Attributes:
        widths: Channels before and after, by group name, for the groups that lost some.
        params: Number of parameters before and after.
    """

    widths: dict[str, tuple[int, int]]
    params: tuple[int, int]

    def __str__(self) -> str:
        lines = [f"{name}: {before} -> {after} channels" for name, (before, after) in self.widths.items()]
        before, after = self.params
        return "\n".join([*lines, f"parameters: {before:,} -> {after:,} ({after / max(before, 1):.1%})"])


def prune(model: nn.Module, plan: PruningPlan, optimizers: Iterable[Any] = ()) -> PruneReport:
    """Remove the channels that a plan does not keep, for good and in place.

    Parameters keep their identity: every reference to them (parameter groups, hooks, lists of yours) stays good. State
    that an optimizer keeps in the shape of a parameter loses the same channels; all other state is kept. Everything is
    checked before the first tensor is touched.

    Args:
        model: The model that the plan is about, pruned already or not.
        plan: The channels that stay, about the original model.
        optimizers: The optimizers that train the model.

    Returns:
        What changed.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what has been removed before.
        TypeError: If the model is wrapped for distributed training, or an optimizer cannot be sliced.

    Example:
        >>> from lightning_prune import criteria, plan, trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> graph = trace(model, torch.zeros(1, 4))
        >>> report = prune(model, plan(graph, criteria.magnitude(graph), keep=0.5, round_to=1))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    optimizers = check(model, optimizers)
    earlier = plan_in_force(model)
    joined = plan.after(earlier)
    tensors = named_tensors(model)
    _check_shapes(tensors, joined, earlier)
    steps = _steps(joined, earlier)
    _check_state(tensors, steps, optimizers)
    params_before = _count(tensors)
    for name, axes in steps.items():
        _slice_tensor(tensors[name], axes, optimizers)
    _finish(model, joined, [tensors[name] for name in steps])
    before = earlier.widths if earlier is not None else {}
    widths = {
        name: (before.get(name, group.size), len(group.kept))
        for name, group in joined.groups.items()
        if before.get(name, group.size) != len(group.kept)
    }
    return PruneReport(widths, (params_before, _count(tensors)))


def pruned_tensors(model: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    """Return what `prune` would leave of the tensors that lose channels, without changing the model.

    Args:
        model: The model that the plan is about, pruned already or not.
        plan: The channels that stay, about the original model.

    Returns:
        Copies of the parameters and buffers that get smaller, by dotted name.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what has been removed before.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> plan = trace(model, torch.zeros(1, 4)).plan({"0": torch.tensor([0, 2])})
        >>> {name: tuple(tensor.shape) for name, tensor in pruned_tensors(model, plan).items()}
        {'0.weight': (2, 4), '0.bias': (2,), '2.weight': (2, 2)}
    """
    earlier = plan_in_force(model)
    joined = plan.after(earlier)
    tensors = named_tensors(model)
    _check_shapes(tensors, joined, earlier)
    return {name: _take(tensors[name].detach(), axes) for name, axes in _steps(joined, earlier).items()}


def reshape(model: nn.Module, plan: PruningPlan | None) -> None:
    """Give a model the shapes of a plan, to load the weights that belong to it; the values are then without meaning.

    Unlike `prune` this can also make a model wider again.

    Args:
        model: The model, pruned already or not.
        plan: The plan to have in force afterwards; None for the original shapes.

    Raises:
        ValueError: If the plan is about another architecture.
    """
    earlier = plan_in_force(model)
    if earlier is None and plan is None:
        return
    tensors = named_tensors(model)
    _check_shapes(tensors, plan or PruningPlan(), earlier)
    shapes = {**(earlier.shapes if earlier else {}), **(plan.pruned_shapes() if plan else {})}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            _replace(tensors[name], tensors[name].detach().new_zeros(shape))
            tensors[name].grad = None
    _finish(model, plan, [tensors[name] for name in shapes])


def check(model: nn.Module, optimizers: Iterable[Any] = ()) -> list[torch.optim.Optimizer]:
    """Refuse what `prune` cannot work with, whatever the plan; for those who want to know before training starts.

    Args:
        model: The model that is to be pruned.
        optimizers: The optimizers that train the model, wrapped by Lightning or not.

    Returns:
        The optimizers, without wrappers, and those that they keep inside with state of their own.

    Raises:
        TypeError: If the model is wrapped for distributed training, or an optimizer cannot be sliced.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> check(model, [torch.optim.LBFGS(model.parameters())])
        Traceback (most recent call last):
        TypeError: LBFGS keeps its history for all parameters in one vector, which cannot lose channels; use another ...
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(f"The model is wrapped in {type(model).__name__}; prune `model.module` and wrap it again.")
    found = _with_those_inside(optimizers)
    for optimizer in found:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS keeps its history for all parameters in one vector, which cannot lose channels; use another "
                "optimizer, such as SGD or AdamW."
            )
        inner = getattr(optimizer, "optim", None)  # ZeroRedundancyOptimizer
        if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
            raise TypeError(
                f"{type(optimizer).__name__} spreads its state over the ranks, where it cannot be sliced; use the "
                f"{type(inner).__name__} in it as it is."
            )
    return found


def _with_those_inside(optimizers: Iterable[Any]) -> list[torch.optim.Optimizer]:
    """Add the optimizers that others step with, as in sharpness-aware minimisation."""
    found: list[torch.optim.Optimizer] = []
    waiting = [_unwrapped(optimizer) for optimizer in optimizers]
    for optimizer in waiting:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} is no torch optimizer; pass the optimizers that train the model."
            )
        if not any(optimizer is other or optimizer.state is other.state for other in found):
            found.append(optimizer)
            held = tree_leaves(list(vars(optimizer).values()))
            waiting += [_unwrapped(inner) for inner in held if isinstance(inner, torch.optim.Optimizer)]
    return found


def _unwrapped(optimizer: Any) -> Any:
    """Return what a wrapper wraps that has no state of its own, such as Lightning's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    own = isinstance(optimizer, torch.optim.Optimizer) and getattr(inner, "state", None) is not optimizer.state
    return optimizer if own else inner


def _check_shapes(tensors: Mapping[str, Tensor], plan: PruningPlan, earlier: PruningPlan | None) -> None:
    now = earlier.pruned_shapes() if earlier is not None else {}
    for name, original in plan.shapes.items():
        if name not in tensors:
            raise ValueError(f"The plan is about another architecture: the model has no tensor {name!r}.")
        expected = now.get(name, original)
        if tuple(tensors[name].shape) != expected:
            raise ValueError(
                f"The plan is about another architecture: {name!r} has shape {tuple(tensors[name].shape)} where the "
                f"plan expects {expected}."
            )


def _check_state(tensors: Mapping[str, Tensor], touched: Iterable[str], optimizers: list[Any]) -> None:
    """Refuse optimizer state of which nobody can say what belongs to a channel."""
    for optimizer in optimizers:
        for name in touched:
            for key, value in optimizer.state.get(tensors[name], {}).items():
                held = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1]
                if held and not (isinstance(value, Tensor) and _fits(value, tensors[name])):
                    shapes = " and ".join(str(tuple(leaf.shape)) for leaf in held)
                    raise TypeError(
                        f"{type(optimizer).__name__} keeps {key!r} of {name!r} in shape {shapes}, where nothing says "
                        "which numbers belong to which channel; use another optimizer, such as SGD or AdamW."
                    )


def _fits(value: Tensor, tensor: Tensor) -> bool:
    sizes = zip(value.shape, tensor.shape, strict=False)
    return value.dim() == tensor.dim() and all(own in (1, size) for own, size in sizes)


def _steps(plan: PruningPlan, earlier: PruningPlan | None) -> dict[str, dict[int, Tensor]]:
    """Return what to take of each tensor as it is now, by axis, to get from the earlier plan to this one."""
    before = earlier.index() if earlier is not None else {}
    steps: dict[str, dict[int, Tensor]] = {}
    searched: dict[tuple[int, int], Tensor] = {}  # most axes of a group share one index
    for name, axes in plan.index().items():
        for axis, stays in axes.items():
            had = before.get(name, {}).get(axis)
            if had is None:
                steps.setdefault(name, {})[axis] = stays
            elif had.shape != stays.shape:
                key = (id(had), id(stays))
                if key not in searched:
                    searched[key] = torch.searchsorted(had, stays)
                steps.setdefault(name, {})[axis] = searched[key]
    return steps


def _take(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Copy the positions that stay, in the memory format of the tensor."""
    axes = {axis: axes[axis].to(tensor.device) for axis in sorted(axes)}
    taken = tensor
    if tensor.is_sparse or tensor.numel() <= _LARGE:  # a sparse tensor holds few of its numbers
        for axis, index in axes.items():  # rows first: they are cheapest to copy, and what follows has less to do
            taken = taken.index_select(axis, index)
        return taken if tensor.is_sparse else taken.contiguous(memory_format=_memory_format(tensor))
    # Some rows at a time: of a large tensor, only what stays is ever in memory beside it.
    shape = [axes[axis].shape[0] if axis in axes else size for axis, size in enumerate(tensor.shape)]
    taken = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=_memory_format(tensor))
    rows = axes.pop(0, None)
    runs = {axis: _run_length(index, tensor.shape[axis]) for axis, index in axes.items()}
    step = max(1, _LARGE * tensor.shape[0] // tensor.numel())
    for start in range(0, shape[0], step):
        part = tensor[start : start + step] if rows is None else tensor.index_select(0, rows[start : start + step])
        for axis, index in axes.items():
            part = _select_runs(part, axis, index, runs[axis])
        taken[start : start + step] = part
    return taken


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _select_runs(tensor: Tensor, axis: int, index: Tensor, run: int) -> Tensor:
    """Copy the positions that stay along an axis; runs of neighbouring positions are copied as one."""
    if run == 1:
        return tensor.index_select(axis, index)
    blocks = tensor.contiguous().unflatten(axis, (-1, run))
    return blocks.index_select(axis, index[::run] // run).flatten(axis, axis + 1)


def _run_length(index: Tensor, size: int) -> int:
    """Return the greatest length such that whole blocks of that many neighbouring positions stay or leave."""
    cuts = (index.diff() != 1).nonzero()[:, 0] + 1
    ends = torch.stack([index[cuts - 1] + 1, index[cuts]]).reshape(-1).tolist() if len(cuts) else []
    return math.gcd(size, int(index[0]), int(index[-1]) + 1, *ends)


def _slice_tensor(tensor: Tensor, axes: Mapping[int, Tensor], optimizers: list[Any]) -> None:
    """Slice a tensor, its gradient and what optimizers keep in its shape."""
    for optimizer in optimizers:
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == tensor.dim() and value.dim() > 0:
                own = {axis: index for axis, index in axes.items() if value.shape[axis] == tensor.shape[axis]}
                state[key] = _take(value, own)
    gradient = tensor.grad
    tensor.grad = None
    _replace(tensor, _take(tensor.detach(), axes))
    if gradient is not None:
        tensor.grad = _take(gradient, axes)


def _replace(tensor: Tensor, data: Tensor) -> None:
    # Autograd may hold on to a node that accumulates the gradient of this parameter and remembers its shape. It is
    # made anew when the data changes its type, not when it changes its shape, hence the step over another type: one
    # that every device has, which float64 is not.
    other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))


def _finish(model: nn.Module, plan: PruningPlan | None, changed: Iterable[Tensor]) -> None:
    """Bring size attributes in step and note the plan on the model."""
    for module in owning_modules(model, changed):
        sync_attributes(module)
    record_plan(model, plan)
