"""The state of a pruning callback: one dataclass of all that has to survive a checkpoint.

A callback declares what it has to remember as fields of its ``State``, each with a default, and says there too how a
field is written where it is neither a plain value nor a tensor, and whether it differs between the ranks. From that
alone `PruningCallback` saves, restores and resets it.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from torch import Tensor, distributed
from torch.utils._pytree import tree_map

from lightning_prune.reporting.history import History

__all__ = ["State", "deal_out", "from_checkpoint", "gather", "per_rank", "stored", "to_checkpoint"]

_FORM = "lightning_prune"  # in the metadata of a field


@dataclass(frozen=True)
class _Form:
    """How the value of a field is written to a checkpoint and read from it."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]
    per_rank: bool = False


def _as_it_is(value: Any) -> Any:
    return value


_PLAIN = _Form(_as_it_is, _as_it_is)


def stored(write: Callable[[Any], Any], read: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the ``metadata`` of a field of a `State` that is neither a plain value nor a tensor.

    Args:
        write: Turns the value into plain values and tensors.
        read: Turns these into the value again.
    """
    return {_FORM: _Form(write, read)}


def per_rank(write: Callable[[Any], Any], read_all: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Return the ``metadata`` of a field of a `State` that differs between the ranks: checkpoints hold all of them.

    Args:
        write: Turns the value of one rank into plain values and tensors.
        read_all: Turns a list of these into a value. On as many ranks as the checkpoint was written by, it gets what
            the rank has written itself; on fewer ranks the values of several, on more ranks those of one or none.
    """
    return {_FORM: _Form(write, read_all, per_rank=True)}


def _write_history(history: History | None) -> dict[str, Any] | None:
    return history.to_json() if history is not None else None


def _read_history(content: dict[str, Any] | None) -> History | None:
    return History.from_json(content) if content else None


@dataclass
class State:
    """What a pruning callback has to remember; subclasses add fields, each with a default.

    Attributes:
        steps_done: Number of prunes so far.
        batch_like: Shape and type of the first batch, where the example inputs are like it.
        history: What became of the network; on the first rank.

    Example:
        >>> @dataclass
        ... class MyState(State):
        ...     losses: list[float] = field(default_factory=list)
        >>> content = to_checkpoint(MyState(steps_done=1, losses=[0.5]))
        >>> content
        {'steps_done': 1, 'batch_like': None, 'history': None, 'losses': [0.5]}
        >>> from_checkpoint(MyState, content)
        MyState(steps_done=1, batch_like=None, history=None, losses=[0.5])
    """

    steps_done: int = 0
    batch_like: dict[str, Any] | None = None
    history: History | None = field(default=None, metadata=stored(_write_history, _read_history))

    @classmethod
    def upgraded(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what an earlier version saved under the names of today's fields."""
        return content


AnyState = TypeVar("AnyState", bound=State)


def to_checkpoint(state: State) -> dict[str, Any]:
    """Return the fields of a state as plain values and tensors on the CPU; those that differ by rank as a list."""
    content: dict[str, Any] = {}
    for declared in fields(state):
        form = _form_of(declared)
        written = tree_map(_on_cpu, form.write(getattr(state, declared.name)))
        content[declared.name] = [written] if form.per_rank else written
    return content


def from_checkpoint(kind: type[AnyState], content: Mapping[str, Any]) -> AnyState:
    """Make a state of what `to_checkpoint` returned; fields that were not saved have their defaults.

    Args:
        kind: The class of the state.
        content: What was saved, by this or an earlier version.
    """
    content = kind.upgraded(content)
    saved = [declared for declared in fields(kind) if declared.name in content]
    return kind(**{declared.name: _form_of(declared).read(content[declared.name]) for declared in saved})


def gather(kind: type[State], content: dict[str, Any]) -> None:
    """Replace the fields that differ between the ranks by those of all ranks; to be called on each of them.

    Args:
        kind: The class of the state.
        content: What `to_checkpoint` returned on this rank, changed in place.
    """
    for name in _names_per_rank(kind):
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, content[name])
        content[name] = [value for (value,) in everyone]


def deal_out(kind: type[State], content: dict[str, Any], rank: int, ranks: int) -> None:
    """Give a rank its share of the fields that differ between the ranks.

    Args:
        kind: The class of the state.
        content: What was saved, changed in place.
        rank: Number of this rank.
        ranks: Number of ranks, which need not be that of the run that has saved it.
    """
    for name in _names_per_rank(kind):
        if name in content:
            content[name] = content[name][rank::ranks]


def _names_per_rank(kind: type[State]) -> list[str]:
    return [declared.name for declared in fields(kind) if _form_of(declared).per_rank]


def _form_of(declared: "Field[Any]") -> _Form:
    return declared.metadata.get(_FORM, _PLAIN)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
