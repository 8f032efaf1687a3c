"""Checks of optimizers before a prune: what they keep can be sliced, and they go on after it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.pruning_plan import Index
from lightning_prune.surgery.optimizer_contents import package_of, with_inner
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
    for optimizer in optimizers:
        family = with_inner([optimizer])
        trained = [parameter for each in family for group in each.param_groups for parameter in group["params"]]
        ids = {id(parameter) for parameter in trained}
        losing = {name: tensor for name, tensor in tensors.items() if id(tensor) in ids}
        if not losing:
            continue
        wrapper = [] if package_of(optimizer) in ("torch", "lightning", "pytorch_lightning") else [optimizer]
        check_places({id(holder): holder for holder in [*wrapper, *family]}.values(), [*own, *trained])
        check_shapes(family, losing)
        if not all(package_of(each) == "torch" for each in family):
            _check_axes(family, losing, kept)


def _check_axes(family: Sequence[Optimizer], tensors: Mapping[str, Tensor], kept: Index) -> None:
    """Raise a TypeError if a state in the shape of a parameter is about something else, or its axes are not told."""
    verdicts = _tried_out(family, tensors, kept)
    for index, optimizer in enumerate(family):
        if package_of(optimizer) == "torch":
            continue
        for name, tensor in tensors.items():
            for key, value in sliceable(optimizer, tensor).items():
                follows = verdicts.get((index, name, key))
                if follows is None:
                    follows = _told_by_shape(optimizer, key, tensor, kept[name]) or not value.any()
                if not follows:
                    raise TypeError(
                        f"{type(optimizer).__name__} keeps {key!r} of {name!r} in the shape of the parameter, but its "
                        f"axes are other ones or cannot be told apart; {REMEDY}."
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
    others = [other for other in optimizer.state if isinstance(other, Tensor) and key in sliceable(optimizer, other)]
    alike = [other for other in others if other.dim() == tensor.dim()]
    return any(all(other.shape.count(other.shape[axis]) == 1 for axis in kept) for other in [tensor, *alike])
