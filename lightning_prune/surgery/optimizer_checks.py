"""Checks of optimizers before a prune: what they keep can be sliced, and they go on after it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.pruning_plan import Index
from lightning_prune.surgery.optimizer_contents import LIGHTNING, package_of, with_inner
from lightning_prune.surgery.optimizer_state import REMEDY, check_places, check_shapes, sliceable
from lightning_prune.surgery.optimizer_trial import Verdicts, try_out
from lightning_prune.surgery.slicing import KeptByAxis

__all__ = ["check_state"]


def check_state(optimizers: Iterable[Any], own: Iterable[Tensor], tensors: Mapping[str, Tensor], kept: Index) -> None:
    """Raise a TypeError if nothing says which numbers that an optimizer keeps belong to a channel.

    What torch's own optimizers keep in the shape of a parameter is known to follow it; others are tried out.

    Args:
        optimizers: Optimizers, wrapped or not.
        own: The parameters and buffers of the model.
        tensors: Those that lose channels, by dotted name.
        kept: The positions of these to keep, by the same names.
    """
    own = list(own)
    for optimizer in optimizers:
        family = with_inner([optimizer])
        trained = _trained(family)
        ids = {id(parameter) for parameter in trained}
        losing = {name: tensor for name, tensor in tensors.items() if id(tensor) in ids}
        if not losing:
            continue
        check_places(_holders(optimizer, family), [*own, *trained])
        check_shapes(family, losing)
        if any(map(_is_of_others, family)):
            _check_axes(family, losing, kept)


def _trained(family: Iterable[Optimizer]) -> list[Tensor]:
    """Return the parameters that optimizers train."""
    trained = []
    for optimizer in family:
        for group in optimizer.param_groups:
            trained += group["params"]
    return trained


def _holders(optimizer: Any, family: Sequence[Optimizer]) -> list[Any]:
    """Return what may hold numbers: the optimizers, and what somebody else than Lightning wraps them in."""
    is_known = any(optimizer is each for each in family)
    if is_known or package_of(optimizer) in LIGHTNING:
        return [*family]
    return [optimizer, *family]


def _is_of_others(optimizer: Optimizer) -> bool:
    return package_of(optimizer) != "torch"


def _check_axes(family: Sequence[Optimizer], tensors: Mapping[str, Tensor], kept: Index) -> None:
    """Raise a TypeError if a state in the shape of a parameter is about something else, or its axes are not told."""
    verdicts = _tried_out(family, tensors, kept)
    for index, optimizer in enumerate(family):
        if not _is_of_others(optimizer):
            continue
        for name, tensor in tensors.items():
            for key, value in sliceable(optimizer, tensor).items():
                follows = verdicts.get((index, name, key))
                if follows is None:
                    follows = _told_by_shape(optimizer, key, tensor, kept[name]) or not value.any()
                if not follows:
                    what = f"{type(optimizer).__name__} keeps {key!r} of {name!r}"
                    raise TypeError(
                        f"{what} in the shape of the parameter, but its axes are other ones or cannot be told apart; "
                        f"{REMEDY}."
                    )


def _tried_out(family: Sequence[Optimizer], tensors: Mapping[str, Tensor], kept: Index) -> Verdicts:
    try:
        return try_out(family, tensors, kept)
    except ArithmeticError as error:
        raise TypeError(
            f"{type(family[0]).__name__} cannot step any more once channels are pruned ({error}): it keeps numbers "
            f"elsewhere than in its state of the parameters; {REMEDY}."
        ) from error


def _told_by_shape(optimizer: Optimizer, key: Any, tensor: Tensor, kept: KeptByAxis) -> bool:
    """Tell whether this parameter, or another one with such a state, has no axis as long as one that gets shorter."""
    for other in [tensor, *optimizer.state]:
        counts = [0]
        if isinstance(other, Tensor) and other.dim() == tensor.dim() and key in sliceable(optimizer, other):
            counts = [other.shape.count(other.shape[axis]) for axis in kept]
        if max(counts) == 1:
            return True
    return False
