"""The state of a pruning callback: one dataclass of all that has to survive a checkpoint.

A callback declares what it has to remember as fields of its ``State``, each with a default, and says there too how a
field is written where it is neither a plain value nor a tensor, and whether it differs between the ranks. From that
alone `PruningCallback` saves, restores and resets it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from torch import Tensor, distributed
from torch.utils._pytree import tree_map

from lightning_prune.reporting.history import History

__all__ = [
    "State",
    "Stop",
    "deal_out",
    "from_checkpoint",
    "gather",
    "per_rank",
    "stored",
    "to_checkpoint",
    "under",
    "without_what_depends_on",
]

_FORM = "lightning_prune"  # in the metadata of a field
_SETTINGS = "lightning_prune_settings"  # also

Convert = Callable[[Any], Any]
Content = dict[str, Any]  # plain values and tensors, by the name of the field


@dataclass(frozen=True)
class _Form:
    """How the value of a field is written to a checkpoint and read from it."""

    write: Convert
    read: Convert
    per_rank: bool = False


def _as_it_is(value: Any) -> Any:
    return value


_PLAIN = _Form(_as_it_is, _as_it_is)


def stored(write: Convert, read: Convert) -> Content:
    """Return the ``metadata`` of a field of a `State` that is neither a plain value nor a tensor.

    Args:
        write: Turns the value into plain values and tensors.
        read: Turns these into the value again.
    """
    return {_FORM: _Form(write, read)}


def per_rank(write: Convert, read_all: Callable[[list[Any]], Any]) -> Content:
    """Return the ``metadata`` of a field of a `State` that differs between the ranks: checkpoints hold all of them.

    Args:
        write: Turns the value of one rank into plain values and tensors.
        read_all: Turns a list of these into a value. On as many ranks as the checkpoint was written by, it gets what
            the rank has written itself; on fewer ranks the values of several, on more ranks those of one or none.
    """
    return {_FORM: _Form(write, read_all, per_rank=True)}


def under(*settings: str) -> Content:
    """Return the ``metadata`` of a field of a `State` whose value means something under some settings alone.

    A run that is resumed with another value of one of them begins with the default of the field.

    Args:
        settings: Names of arguments of the callback.

    Example:
        >>> @dataclass
        ... class MyState(State):
        ...     losses: list[float] = field(default_factory=list, metadata=under("seed"))
        >>> without_what_depends_on(MyState(steps_done=1, losses=[0.5]), {"seed"})
        (MyState(steps_done=1, batch_like=None, training_batch_like=None, history=None, losses=[]), ['losses'])
    """
    return {_SETTINGS: frozenset(settings)}


def _write_history(history: History | None) -> Content | None:
    return history.to_json() if history is not None else None


def _read_history(content: Content | None) -> History | None:
    return History.from_json(content) if content else None


@dataclass
class Stop:
    """What is known of the metric that may not drop too far.

    Attributes:
        reference: Its value before the first prune.
        value: Its value at the last validation.
        measured: Number of epochs trained until then.
        pruned: Number of epochs trained before the last prune; -1 before the first.
        achieved: Fraction of the original cost that the last prune has kept.
        judged: Number of prunes after which it was within the drop.
        over: Whether no more is pruned.
        snapshot: The last network that was within the drop, and how far the run had pruned it.
    """

    reference: float | None = None
    value: float | None = None
    measured: int = 0
    pruned: int = -1
    achieved: float = 1.0
    judged: int = 0
    over: bool = False
    snapshot: dict[str, Any] = field(default_factory=dict)

    def begin_again(self) -> None:
        """Forget in which epochs things happened, as a run begins that counts its own."""
        self.value = None
        self.measured = 0
        self.pruned = -1


def _read_stop(content: Content) -> Stop:
    return Stop(**content)


@dataclass
class State:
    """What a pruning callback has to remember; subclasses add fields, each with a default.

    Attributes:
        steps_done: Number of prunes so far.
        batch_like: What the example inputs are like, where they were taken from a batch.
        training_batch_like: What the first training batch is like, where a loader would lose it.
        history: What became of the network; on the first rank.
        teacher: Parameters and buffers of the network before the first prune, by name, if it teaches.
        stop: What is known of the metric that says when to stop, if one does.

    Example:
        >>> @dataclass
        ... class MyState(State):
        ...     losses: list[float] = field(default_factory=list)
        >>> content = to_checkpoint(MyState(steps_done=1, losses=[0.5]))
        >>> content["steps_done"], content["losses"]
        (1, [0.5])
        >>> from_checkpoint(MyState, content)
        MyState(steps_done=1, batch_like=None, training_batch_like=None, history=None, losses=[0.5])
    """

    steps_done: int = 0
    batch_like: Content | None = None
    training_batch_like: Content | None = None
    history: History | None = field(default=None, metadata=stored(_write_history, _read_history))
    teacher: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    stop: Stop = field(default_factory=Stop, repr=False, compare=False, metadata=stored(vars, _read_stop))

    @classmethod
    def upgraded(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what an earlier version saved under the names of today's fields."""
        return content


AnyState = TypeVar("AnyState", bound=State)


def to_checkpoint(state: State) -> Content:
    """Return the fields of a state as plain values and tensors on the CPU; those that differ by rank as a list."""
    content: Content = {}
    for declared in fields(state):
        form = _form_of(declared)
        value = getattr(state, declared.name)
        written = tree_map(_on_cpu, form.write(value))
        content[declared.name] = [written] if form.per_rank else written
    return content


def from_checkpoint(kind: type[AnyState], content: Mapping[str, Any]) -> AnyState:
    """Make a state of what `to_checkpoint` returned; fields that were not saved have their defaults.

    Args:
        kind: The class of the state.
        content: What was saved, by this or an earlier version.
    """
    content = kind.upgraded(content)
    values = {}
    for declared in fields(kind):
        if declared.name in content:
            form = _form_of(declared)
            values[declared.name] = form.read(content[declared.name])
    return kind(**values)


def without_what_depends_on(state: AnyState, settings: Collection[str]) -> tuple[AnyState, list[str]]:
    """Return a state in which what means something under other settings alone has its default, and what that is.

    Args:
        state: The state.
        settings: The settings that have changed.
    """
    empty: Any = type(state)()
    depending = [one.name for one in fields(state) if not one.metadata.get(_SETTINGS, frozenset()).isdisjoint(settings)]
    defaults = {name: getattr(empty, name) for name in depending}
    forgotten = [name for name, value in defaults.items() if getattr(state, name) != value]
    return replace(state, **defaults), forgotten


def gather(kind: type[State], content: Content) -> None:
    """Replace the fields that differ between the ranks by those of all ranks; to be called on each of them.

    Args:
        kind: The class of the state.
        content: What `to_checkpoint` returned on this rank, changed in place.
    """
    ranks = distributed.get_world_size()
    for name in _names_per_rank(kind):
        everyones: list[Any] = [None] * ranks
        (own,) = content[name]
        distributed.all_gather_object(everyones, own)
        content[name] = everyones


def deal_out(kind: type[State], content: Content, rank: int, ranks: int) -> None:
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
    differing = [declared for declared in fields(kind) if _form_of(declared).per_rank]
    return [declared.name for declared in differing]


def _form_of(declared: "Field[Any]") -> _Form:
    return declared.metadata.get(_FORM, _PLAIN)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
