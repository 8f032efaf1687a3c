"""Pruning: channels are taken out of parameters, buffers, gradients and optimizer state, all of them or none."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.graph.adapting import adapt
from lightning_prune.graph.sizes import sync_attributes
from lightning_prune.graph.substitution import modules_in_step, named_submodules, named_tensors
from lightning_prune.pruning_plan import Index, PruningPlan, plan_in_force, record_plan
from lightning_prune.surgery.compensation_report import CompensationReport
from lightning_prune.surgery.forgotten import expect_others
from lightning_prune.surgery.optimizer_checks import check_state
from lightning_prune.surgery.optimizer_contents import listed
from lightning_prune.surgery.optimizer_state import check_optimizers, sliced_state
from lightning_prune.surgery.replacing import Replacement, in_place, of_attributes, of_slices, of_tensor
from lightning_prune.surgery.slicing import take

__all__ = [
    "Change",
    "Follower",
    "PruneReport",
    "check",
    "check_plan",
    "complete",
    "kept_positions",
    "of_record",
    "prune",
    "pruned",
    "pruned_tensors",
    "reshape",
]


class Change(NamedTuple):
    """A number before and after a prune."""

    before: int
    after: int


@dataclass(frozen=True)
class Follower:
    """Tensors elsewhere that follow those of a model, such as an average of them, and lose the same channels.

    Attributes:
        tensors: The tensors, by the names of those that they follow.
        module: The module that they belong to, if they do.
    """

    tensors: Mapping[str, Tensor]
    module: nn.Module | None = None

    def replacements(self, kept: Index) -> Iterator[Replacement]:
        """Make what is smaller afterwards.

        Args:
            kept: The positions to keep of the tensors that are followed.
        """
        changed = [tensor for name, tensor in self.tensors.items() if name in kept]
        for name, tensor in self.tensors.items():
            if name in kept:
                yield of_slices(tensor, kept[name])
        if self.module is not None:
            yield self.sizes(changed)

    def sizes(self, changed: Iterable[Tensor]) -> Replacement:
        """Let the size attributes of the module follow tensors of it that change."""
        assert self.module is not None
        modules = modules_in_step(self.module, changed)
        return of_attributes(self.module, partial(_sync, modules))


@dataclass(frozen=True)
class PruneReport:
    """What a prune changed.

    Attributes:
        widths: Channels before and after, by group name, for the groups that lose some.
        params: Number of parameters before and after.
        plan: The channels that are kept, about the original model.
        compensation: What was done to the weights that are kept.
    """

    widths: dict[str, Change]
    params: Change
    plan: PruningPlan = field(default_factory=PruningPlan, repr=False)
    compensation: CompensationReport = field(default_factory=CompensationReport)

    def __str__(self) -> str:
        lines = []
        for name, width in self.widths.items():
            lines.append(f"{name}: {width.before} -> {width.after} channels" if width.after else f"{name}: pruned")
        before, after = self.params
        share = after / max(before, 1)
        lines.append(f"parameters: {before:,} -> {after:,} ({share:.1%})")
        if self.compensation.method != "none":
            lines.append(str(self.compensation))
        return "\n".join(lines)


def prune(model: nn.Module, plan: PruningPlan, optimizers: Any = ()) -> PruneReport:
    """Prune the channels that a plan does not keep, for good and in place.

    Parameters keep their identity: every reference to them (parameter groups, hooks, lists of yours) keeps its meaning.
    State that an optimizer keeps in the shape of a parameter loses the same channels; all other state is kept.
    Everything is checked and made before the first tensor is touched: a prune that fails, for want of memory or by
    Ctrl-C, leaves model and optimizers as they were.

    Args:
        model: The model that the plan is about, pruned already or not.
        plan: The channels to keep, about the original model.
        optimizers: The optimizer that trains the model, or several.

    Returns:
        What changed.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what has been pruned before.
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
    with pruned(model, plan, optimizers) as report:
        return report


@contextmanager
def pruned(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Any] = (),
    copies: Iterable[nn.Module] = (),
    followers: Iterable[Follower] = (),
) -> Iterator[PruneReport]:
    """Prune as `prune` does, for a block and for good; if anything is raised in it, nothing has been pruned.

    Args:
        model: The model that the plan is about.
        plan: The channels to keep, about the original model.
        optimizers: The optimizers that train the model.
        copies: Copies of the model, such as averages of its weights, that lose the same channels.
        followers: Tensors elsewhere that follow those of the model, and lose the same channels.

    Yields:
        What changed of the model.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what has been pruned before.
        TypeError: If the model is wrapped for distributed training, or an optimizer cannot be sliced.
    """
    optimizers = listed(optimizers)
    found = check(model, optimizers)
    cuts = [_Cut.of(each, plan) for each in (model, *copies)]
    check_state(optimizers, named_tensors(model).values(), cuts[0].tensors, cuts[0].kept)
    replacements = [replacement for cut in cuts for replacement in cut.replacements(found)]
    for follower in followers:
        replacements.extend(follower.replacements(cuts[0].kept))
    params_before = _count(cuts[0].parameters)
    with in_place(replacements):
        params = Change(params_before, _count(cuts[0].parameters))
        yield PruneReport(cuts[0].widths, params, plan)
    expect_others(cuts[0].tensors.values(), found)


def pruned_tensors(model: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    """Return the smaller tensors that `prune` would make, without changing the model.

    Args:
        model: The model that the plan is about, pruned already or not.
        plan: The channels to keep, about the original model.

    Returns:
        Copies of the parameters and buffers that get smaller, by dotted name.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what has been pruned before.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> plan = trace(model, torch.zeros(1, 4)).plan({"0": torch.tensor([0, 2])})
        >>> {name: tuple(tensor.shape) for name, tensor in pruned_tensors(model, plan).items()}
        {'0.weight': (2, 4), '0.bias': (2,), '2.weight': (2, 2)}
    """
    cut = _Cut.of(model, plan)
    return {name: take(tensor.detach(), cut.kept[name]) for name, tensor in cut.tensors.items()}


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
    before = earlier or PruningPlan()
    after = plan or PruningPlan()
    _check_shapes(tensors, after, before)
    shapes = {**before.shapes, **after.pruned_shapes()}
    replacements = []
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            zeros = tensor.detach().new_zeros(shape)
            replacements.append(of_tensor(tensor, zeros, None))
    touched = [tensors[name] for name in shapes]
    replacements.append(of_record(model, plan, touched))
    with in_place(replacements):
        pass
    expect_others(touched, [])


def complete(model: nn.Module, plan: PruningPlan) -> None:
    """Prune the rest of a model, some tensors of which have the shapes of a plan already without a note of it.

    A submodule that shared a group with others, and was pruned with them, is like that in another model. Nothing is
    done to a model that is not.

    Args:
        model: The model.
        plan: The plan that is in force afterwards.
    """
    earlier = plan_in_force(model) or PruningPlan()
    tensors = named_tensors(model)
    expected = {**plan.shapes, **earlier.pruned_shapes()}
    pruned_shapes = plan.pruned_shapes()
    if plan.shapes.keys() - tensors.keys():
        return
    shapes = {name: tuple(tensors[name].shape) for name in plan.shapes}
    if not any(shapes[name] == pruned_shapes[name] != expected[name] for name in shapes):
        return
    cuts = _cuts_to(plan, shapes)
    if cuts is None:
        return
    replacements = [of_slices(tensors[name], kept) for name, kept in cuts.items()]
    replacements.append(of_record(model, plan, [tensors[name] for name in shapes]))
    with in_place(replacements):
        pass
    expect_others([tensors[name] for name in cuts], [])


def _cuts_to(plan: PruningPlan, shapes: Mapping[str, tuple[int, ...]]) -> Index | None:
    """Return the positions to keep of tensors of some shapes, or None if not all axes are as before a plan or after."""
    cuts: Index = defaultdict(dict)
    for name, axes in plan.index().items():
        for axis, kept in axes.items():
            size = shapes[name][axis] if axis < len(shapes[name]) else 0
            if size == len(kept):
                continue
            if size != plan.shapes[name][axis]:
                return None
            cuts[name][axis] = kept
    return cuts


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
    if isinstance(model, nn.DataParallel):
        raise TypeError("The model is wrapped in DataParallel; prune `model.module` and wrap it again.")
    for name, module in named_submodules(model).items():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            what = f"{name!r} of {type(model).__name__}" if name else "The model"
            raise TypeError(
                f"{what} is a DistributedDataParallel, which knows only the parameters it was made with; prune the "
                "module in it (`model.module`), and wrap that again (with Fabric, by `fabric.setup_module`)."
            )
    return check_optimizers(listed(optimizers))


def check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Raise a ValueError if a plan is about another architecture, without touching the model.

    Args:
        model: The model that is to be pruned or reshaped, pruned already or not.
        plan: The channels to keep, about the original model.

    Example:
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.zeros(1, 4))
        >>> plan = graph.plan({"0": torch.tensor([0])})
        >>> check_plan(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), plan)
        Traceback (most recent call last):
        ValueError: The plan is about another architecture: '0.weight' has shape (5, 4) where the plan expects (3, 4).
    """
    _check_shapes(named_tensors(model), plan, plan_in_force(model) or PruningPlan())


@dataclass(frozen=True)
class _Cut:
    """What a plan takes from a model as it is now.

    Attributes:
        model: The model.
        plan: The plan that is in force afterwards.
        widths: Channels before and after, by name, of the groups that lose some.
        parameters: The parameters of the model.
        tensors: The parameters and buffers that get smaller, by dotted name.
        kept: The positions of these to keep, by the same names.
    """

    model: nn.Module
    plan: PruningPlan
    widths: dict[str, Change]
    parameters: list[Tensor]
    tensors: dict[str, Tensor]
    kept: Index

    @classmethod
    def of(cls, model: nn.Module, plan: PruningPlan) -> "_Cut":
        """Work out the cut; raise a ValueError if the plan does not fit the model."""
        earlier = plan_in_force(model) or PruningPlan()
        joined = plan.after(earlier)
        tensors = named_tensors(model)
        _check_shapes(tensors, joined, earlier)
        kept = kept_positions(joined, earlier)
        return cls(
            model=model,
            plan=joined,
            widths=_changed_widths(joined, earlier),
            parameters=[tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)],
            tensors={name: tensors[name] for name in kept},
            kept=kept,
        )

    def replacements(self, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Replacement]:
        """Make what is smaller afterwards, of the model and of the optimizers that know its parameters."""
        for name, tensor in self.tensors.items():
            kept = self.kept[name]
            yield from sliced_state(optimizers, tensor, kept)
            yield of_slices(tensor, kept)
        yield of_record(self.model, self.plan, self.tensors.values())


def kept_positions(plan: PruningPlan, earlier: PruningPlan) -> Index:
    """Return the positions to keep of the tensors as an earlier plan has made them, for the axes that get shorter.

    Args:
        plan: The channels to keep, about the original model.
        earlier: The plan in force.

    Returns:
        Positions by tensor name and axis.
    """
    index_before = earlier.index()
    search = cache(torch.searchsorted)  # most axes of a group share one tensor of positions
    positions: Index = defaultdict(dict)
    for name, axes in plan.index().items():
        axes_before = index_before.get(name, {})
        for axis, kept in axes.items():
            before = axes_before.get(axis)
            if before is None:
                positions[name][axis] = kept
            elif before.shape != kept.shape:
                positions[name][axis] = search(before, kept)
    return positions


def _changed_widths(plan: PruningPlan, earlier: PruningPlan) -> dict[str, Change]:
    """Return output channels of the first layer before and after, by name, of the groups that lose some."""
    widths_before = earlier.widths
    changed = {}
    for name, group in plan.groups.items():
        before = widths_before.get(name, group.size)
        after = len(group.kept)
        if after < before:
            changed[name] = Change(before * group.width, after * group.width)
    return changed


def _check_shapes(tensors: Mapping[str, Tensor], plan: PruningPlan, earlier: PruningPlan) -> None:
    """Raise a ValueError unless the tensors have the original shapes, or those of the earlier plan."""
    earlier_shapes = earlier.pruned_shapes()
    for name, original_shape in plan.shapes.items():
        if name not in tensors:
            raise ValueError(f"The plan is about another architecture: the model has no tensor {name!r}.")
        shape = tuple(tensors[name].shape)
        expected = earlier_shapes.get(name, original_shape)
        if shape == expected:  # the original shapes must agree as well, where the tensor has that no more
            expected = original_shape
            shape = earlier.shapes.get(name, shape)
        if shape != expected:
            raise ValueError(
                f"The plan is about another architecture: {name!r} has shape {shape} where the plan expects {expected}."
            )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def of_record(model: nn.Module, plan: PruningPlan | None, changed: Iterable[Tensor]) -> Replacement:
    """Note a plan on a model, whose size attributes then follow the tensors that have changed.

    Args:
        model: The model.
        plan: The plan that is in force afterwards; None for the original shapes.
        changed: Tensors of the model whose shapes change.
    """
    modules = modules_in_step(model, changed)
    return of_attributes(model, partial(_finish, model, plan, modules))


def _finish(model: nn.Module, plan: PruningPlan | None, modules: Iterable[nn.Module]) -> None:
    adapt(model, plan or PruningPlan(), plan_in_force(model))
    _sync(modules)
    record_plan(model, plan)


def _sync(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        sync_attributes(module)
