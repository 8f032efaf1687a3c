"""The settings of pruning callbacks: as plain values, the same on all ranks, and other ones after a resume."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor, distributed

from lightning_prune.callbacks.schedule import pruning_callbacks

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["Changed", "changed_settings", "refuse_other_settings", "settings_of"]

Described = list[tuple[str, dict[str, Any]]]
"""Class name and settings of each pruning callback of a rank."""


class Changed(NamedTuple):
    """A setting before and after, as plain values."""

    before: Any
    after: Any


def settings_of(callback: "PruningCallback") -> dict[str, Any]:
    """Return the arguments of the constructors of a callback's classes, as plain values."""
    kinds = [kind for kind in type(callback).__mro__ if "__init__" in vars(kind) and kind is not object]
    names = dict.fromkeys(name for kind in reversed(kinds) for name in inspect.signature(kind).parameters)
    return {name: _plain(getattr(callback, name)) for name in names if hasattr(callback, name)}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, the same in every process; what is none there is named by what it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        return f"Tensor of shape {tuple(value.shape)}"
    name = getattr(value, "__qualname__", None)  # of functions and classes
    return f"{value.__module__}.{name}" if name else type(value).__name__


def _is_same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # NaN is NaN there


# -- of all ranks ------------------------------------------------------------------------------------------------------


def refuse_other_settings(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise a ValueError, on all ranks, unless all of them have the same pruning callbacks with the same settings.

    Ranks that differ would prune to other shapes, or wait for each other without end.

    Args:
        trainer: The trainer.
        callback: The callback that is set up; the first of several asks for all of them.
    """
    callbacks = pruning_callbacks(trainer)
    if callbacks[:1] != [callback] or trainer.world_size == 1 or not distributed.is_initialized():
        return
    own: Described = [(type(other).__name__, settings_of(other)) for other in callbacks]
    of_ranks: list[Described] = [own] * trainer.world_size
    distributed.all_gather_object(of_ranks, own)
    for rank, described in enumerate(of_ranks):
        _refuse_difference(of_ranks[0], described, rank)


def _refuse_difference(first: Described, other: Described, rank: int) -> None:
    """Raise a ValueError if a rank is not set up as the first one is."""
    names, others = (", ".join(name for name, _ in described) for described in (first, other))
    if names != others:
        raise ValueError(
            f"Rank 0 prunes by {names} and rank {rank} by {others}; give all ranks the same callbacks in the same "
            "order."
        )
    for (name, settings), (_, others_settings) in zip(first, other, strict=True):
        for setting in settings.keys() | others_settings.keys():
            values = settings.get(setting), others_settings.get(setting)
            if not _is_same(*values):
                raise ValueError(
                    f"{setting} of {name} is {values[0]!r} on rank 0 and {values[1]!r} on rank {rank}; give all ranks "
                    "the same settings."
                )


# -- of a run that is resumed ------------------------------------------------------------------------------------------


def changed_settings(callback: "PruningCallback") -> dict[str, Changed]:
    """Return the settings that are not those of the run that goes on, by name."""
    if callback.history is None:
        return {}
    before = callback.history.settings
    now = settings_of(callback)
    return {
        name: Changed(before[name], value)
        for name, value in now.items()
        if name in before and not _is_same(before[name], value)
    }
