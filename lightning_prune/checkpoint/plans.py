"""The plan in a checkpoint, beside its weights, and the shapes that models and weights have by it."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_prune.checkpoint.copies import Match, hidden_copies
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery import check_plan, prune, reshape
from lightning_prune.surgery.replacing import in_place

__all__ = [
    "CHECKPOINT_KEY",
    "brings_channels_back",
    "fitted",
    "has_copies",
    "note_copies",
    "plan_belongs_to",
    "prune_copies",
    "refuse_other_shapes",
    "restore_shape",
    "save_plan",
    "saved_plan",
    "widened",
]

CHECKPOINT_KEY = "lightning_prune"

Checkpoint = Mapping[str, Any]
Weights = Mapping[str, Any]  # the state dict in a checkpoint: mostly tensors
Aliases = Mapping[str, str]  # from the names of weights to those that a plan knows them by, where they differ


# -- the plan in a checkpoint ------------------------------------------------------------------------------------------


def save_plan(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put the plan that a model was pruned by into its checkpoint, as plain values; nothing if it was never pruned.

    Args:
        model: The model whose weights the checkpoint holds.
        checkpoint: The checkpoint, changed in place.
    """
    plan = plan_in_force(model)
    if plan is not None:
        checkpoint[CHECKPOINT_KEY] = {"plan": plan.to_json(), "aliases": _aliases(model, plan)}
        note_copies(checkpoint, hidden_copies(model))


def note_copies(checkpoint: dict[str, Any], found: Iterable[tuple[str, Match]]) -> None:
    """Note in a checkpoint which copies of weights have been pruned with them.

    Args:
        checkpoint: The checkpoint, with a plan.
        found: Copies in the shapes of the weights, each with its name.
    """
    content = checkpoint[CHECKPOINT_KEY]
    pruned = PruningPlan.from_json(content["plan"]).shapes.keys()
    noted = [[name, match.source] for name, match in found if not pruned.isdisjoint(match.follower.tensors)]
    if noted:
        content["copies"] = [*content.get("copies", []), *noted]


def has_copies(checkpoint: Checkpoint) -> bool:
    """Tell whether copies of the weights in a checkpoint were pruned with them."""
    return bool(checkpoint.get(CHECKPOINT_KEY, {}).get("copies"))


def prune_copies(model: nn.Module, checkpoint: Checkpoint, found: Iterable[tuple[str, Match]]) -> None:
    """Prune the copies of a model that is not pruned yet as those in a checkpoint: hooks of others may load them.

    Args:
        model: The model.
        checkpoint: The checkpoint that is about to be loaded.
        found: Copies in the shapes of the weights, each with its name.

    Raises:
        ValueError: If the checkpoint is of another architecture.
    """
    plan = saved_plan(checkpoint)
    if plan is None or not has_copies(checkpoint) or plan_in_force(model) is not None:
        return
    check_plan(model, plan)
    noted, index = checkpoint[CHECKPOINT_KEY]["copies"], plan.index()
    for name, match in found:
        # By what they are copies of, too: a layer of a whole teacher may be as wide as one that was pruned.
        if [name, match.source] in noted:
            with in_place(list(match.follower.replacements(index))):
                pass


def saved_plan(checkpoint: Checkpoint) -> PruningPlan | None:
    """Return the plan that belongs to the weights in a checkpoint, or None if they were never pruned.

    Raises:
        ValueError: If the checkpoint is damaged, or of a newer format.
    """
    content = checkpoint.get(CHECKPOINT_KEY)
    if content is None:
        return None
    if not isinstance(content, dict) or "plan" not in content:
        raise ValueError(f"The checkpoint has an entry {CHECKPOINT_KEY!r} without a plan; it is damaged.")
    names = content.get("aliases") or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in (*names, *names.values())):
        raise ValueError(
            f"The checkpoint has an entry {CHECKPOINT_KEY!r} with aliases that are no names; it is damaged."
        )
    return PruningPlan.from_json(content["plan"])


def plan_belongs_to(model: nn.Module, weights: Weights) -> bool:
    """Tell whether weights are those of a pruned model, by their names and shapes.

    Args:
        model: The model.
        weights: What may be its state dict, or that of something else.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> original = model.state_dict()
        >>> report = prune(model, trace(model, torch.zeros(1, 2)).plan({"0": torch.tensor([0, 2])}))
        >>> plan_belongs_to(model, model.state_dict()), plan_belongs_to(model, original)
        (True, False)
    """
    plan = plan_in_force(model)
    if plan is None:
        return False
    aliases = _aliases(model, plan)
    names = {aliases.get(key, key) for key in weights}
    known = not names.isdisjoint(plan.shapes)
    return known and _misshapen(weights, aliases, plan) is None


# -- shapes of weights and models --------------------------------------------------------------------------------------


def widened(checkpoint: Checkpoint, plan: PruningPlan) -> dict[str, Any]:
    """Return a checkpoint as if nothing had been pruned: its weights in their original shapes, without a plan.

    Args:
        checkpoint: The checkpoint of a pruned model; it is not changed.
        plan: The plan in it.

    Returns:
        The checkpoint, with zeros where channels were pruned.

    Raises:
        ValueError: If the weights do not have the shapes that the plan says.
    """
    weights = checkpoint["state_dict"]
    aliases = checkpoint[CHECKPOINT_KEY].get("aliases")
    if aliases is None:
        aliases = _aliases_by_memory(weights, plan)
    _refuse_misshapen(weights, aliases, plan)
    wide = copy.copy(weights)  # with the versions that torch notes on it
    index = plan.index()
    for key, tensor in weights.items():
        name = aliases.get(key, key)
        for axis, kept in index.get(name, {}).items():
            tensor = _widened(tensor, axis, kept, plan.shapes[name][axis])
        wide[key] = tensor
    result = {**checkpoint, "state_dict": wide}
    del result[CHECKPOINT_KEY]
    return result


def _widened(tensor: Tensor, axis: int, kept: Tensor, size: int) -> Tensor:
    """Return a tensor with an axis of its original size, zero where nothing was kept."""
    shape = list(tensor.shape)
    shape[axis] = size
    try:
        zeros = tensor.new_zeros(shape)
    except RuntimeError as raised:
        raise ValueError(
            f"The checkpoint is damaged, or this machine too small: no tensor of shape {tuple(shape)} can be made, as "
            "its plan says."
        ) from raised
    return zeros.index_copy(axis, kept.to(tensor.device), tensor)


def restore_shape(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model the shapes that the weights in a checkpoint have, before they are loaded.

    Args:
        model: The model that the weights go into, of the original architecture, pruned already or not.
        checkpoint: The checkpoint; one without a plan gives the model its original shapes.

    Raises:
        ValueError: If the checkpoint is of another architecture or of a newer format, or brings back channels of
            tensors that it does not hold.
    """
    plan, earlier = saved_plan(checkpoint), plan_in_force(model)
    if plan == earlier:
        return
    if plan is not None:
        check_plan(model, plan)
        _refuse_misshapen(checkpoint.get("state_dict", {}), _aliases(model, plan), plan)
    if earlier is not None and brings_channels_back(model, checkpoint):
        _refuse_missing(model, earlier, checkpoint.get("state_dict", {}))
        reshape(model, None)
    if plan is not None:
        prune(model, plan)  # buffers that are in no checkpoint keep their numbers


def brings_channels_back(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint holds channels that were pruned from a model.

    Args:
        model: The model that the weights go into.
        checkpoint: The checkpoint.
    """
    earlier = plan_in_force(model)
    return earlier is not None and not _prunes_more(saved_plan(checkpoint), earlier)


def fitted(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Bring a checkpoint and a model to the same shapes; once the weights are loaded, `prune` by the plan saved in it.

    An unpruned model keeps its shapes until then: hooks of its own may go by the original shapes of the weights.

    Args:
        model: The model that the weights go into, of the original architecture, pruned already or not.
        checkpoint: The checkpoint; it is not changed.

    Returns:
        The checkpoint whose weights fit the model.

    Raises:
        ValueError: If `widened` or `restore_shape` does.
    """
    plan = saved_plan(checkpoint)
    if plan is not None and plan_in_force(model) is None:
        return widened(checkpoint, plan)
    restore_shape(model, checkpoint)
    return checkpoint


def refuse_other_shapes(model: nn.Module, weights: Weights) -> None:
    """Raise a ValueError that names a tensor whose shape is not that of the model, if there is one."""
    for name, tensor in named_tensors(model).items():
        saved = weights.get(name)
        if not isinstance(saved, Tensor) or saved.shape == tensor.shape:
            continue
        raise ValueError(
            f"The checkpoint is of another architecture: {name!r} has shape {tuple(saved.shape)} in it and "
            f"{tuple(tensor.shape)} in {type(model).__name__}; build it with the settings of the training."
        )


# -- names that share a tensor -----------------------------------------------------------------------------------------


def _aliases(model: nn.Module, plan: PruningPlan) -> dict[str, str]:
    """Return the other names of the tensors in a plan that have several, with the name that the plan knows them by."""
    named: list[tuple[str, Tensor]] = []
    named += model.named_parameters(remove_duplicate=False)
    named += model.named_buffers(remove_duplicate=False)
    known = {id(tensor): name for name, tensor in named if name in plan.shapes}
    aliases = {}
    for name, tensor in named:
        known_name = known.get(id(tensor), name)
        if name not in plan.shapes and known_name != name:
            aliases[name] = known_name
    return aliases


def _aliases_by_memory(weights: Weights, plan: PruningPlan) -> dict[str, str]:
    """Return the aliases in an older checkpoint: names that share a tensor mostly share its memory in the file too."""
    places = {}
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor):
            places[name] = (tensor.data_ptr(), tensor.shape)
    known = {place: name for name, place in places.items() if name in plan.shapes}
    return {name: known.get(place, name) for name, place in places.items()}


class _Misshapen(NamedTuple):
    """A tensor whose shape is not what a plan says."""

    name: str
    shape: tuple[int, ...]


def _misshapen(weights: Weights, aliases: Aliases, plan: PruningPlan) -> _Misshapen | None:
    """Return the first tensor whose shape is not what a plan says, or None."""
    shapes = plan.pruned_shapes()
    for key, tensor in weights.items():
        name = aliases.get(key, key)
        if name not in shapes:
            continue
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        if shape != shapes[name]:
            return _Misshapen(name, shape)
    return None


def _refuse_misshapen(weights: Weights, aliases: Aliases, plan: PruningPlan) -> None:
    """Raise a ValueError unless the weights in a checkpoint have the shapes that its plan says."""
    misshapen = _misshapen(weights, aliases, plan)
    if misshapen is not None:
        expected = plan.pruned_shapes()[misshapen.name]
        raise ValueError(
            f"The checkpoint is damaged: {misshapen.name!r} has shape {misshapen.shape}, where its plan says "
            f"{expected}."
        )


def _prunes_more(plan: PruningPlan | None, earlier: PruningPlan) -> bool:
    """Tell whether a plan keeps nothing that an earlier one has pruned."""
    if plan is None:
        return False
    try:
        return plan.after(earlier) == plan
    except ValueError:
        return False


def _refuse_missing(model: nn.Module, plan: PruningPlan, weights: Weights) -> None:
    """Raise if a tensor whose channels were pruned is not among the weights that are to bring them back."""
    aliases = _aliases(model, plan)
    present = {aliases.get(name, name) for name in weights}
    missing = [repr(name) for name in plan.index() if name not in present]
    if not missing:
        return
    raise ValueError(
        f"{type(model).__name__} has been pruned of channels that the checkpoint brings back, but without the values "
        f"of {', '.join(missing)}, which is not in it; load it onto a fresh instance."
    )
