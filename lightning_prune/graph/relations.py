"""Relations of submodules that no pass shows: which are frozen, and which follow the weights of others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_prune.graph.records import Note, Record, Tie
from lightning_prune.graph.slots import SlotTable, module_of

__all__ = ["NO_RELATIONS", "Relations", "frozen_channels"]

_FROZEN = "is frozen, so that no training would make up for a prune; to prune it, name it with `module`"
_FOLLOWS = "follows the weights of another"


@dataclass(frozen=True)
class Relations:
    """What is known of the submodules of a model.

    Attributes:
        frozen: Dotted names of those whose parameters are all frozen: they keep their channels, unless they follow
            others.
        followed: The tensor whose values each of some tensors follows, by name.
        outside: Tensors that are none of the model's and follow those of it, by the names of these.
    """

    frozen: Sequence[str] = ()
    followed: Mapping[str, str] = field(default_factory=dict)
    outside: Sequence[Mapping[str, Tensor]] = ()

    def ties(self, labelled: SlotTable) -> list[Tie]:
        """Return the ties of tensors that follow others: they lose the same channels."""
        ties = []
        for follower, followed in self.followed.items():
            labels_by_axis = labelled.labels(followed)
            for axis, labels in labelled.labels(follower).items():
                tie = Tie(labels_by_axis[axis], labels, module_of(follower), _FOLLOWS)
                ties.append(tie)
        return ties

    def kept_whole(self, labelled: SlotTable, record: Record) -> list[str]:
        """Return the names of the frozen submodules that follow no others.

        Args:
            labelled: The labels of all tensors.
            record: What passes have shown, by which a submodule may be seen to follow another.
        """
        pairs = set(self.followed.items())
        pairs.update(_pairs_of_weights(labelled, record))
        kept = []
        for name in self.frozen:
            across = [one for one, other in pairs if _is_in(one, name) != _is_in(other, name)]
            if not across:
                kept.append(name)
        return kept


NO_RELATIONS = Relations()


def frozen_channels(labelled: SlotTable, frozen: Sequence[str]) -> list[Note]:
    """Return that the channels of frozen submodules cannot be pruned."""
    notes = []
    for name in frozen:
        for tensor, labels_by_axis in labelled.by_tensor.items():
            if _is_in(tensor, name):
                notes += [Note(labels, name, _FROZEN) for labels in labels_by_axis.values()]
    return notes


def _pairs_of_weights(labelled: SlotTable, record: Record) -> Iterator[tuple[str, str]]:
    """Yield the modules whose weights, and nothing else, have met."""
    for tie in record.ties:
        if tie.of_weights:
            one = labelled.module_of(tie.first)
            other = labelled.module_of(tie.second)
            yield one, other


def _is_in(tensor: str, module: str) -> bool:
    return tensor == module or tensor.startswith(module + ".")
