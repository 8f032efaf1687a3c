"""Writing in place: what is written into a view is then in the tensor that it is a view of."""

import torch
from torch import Tensor

from lightning_prune.graph.operators import Operator
from lightning_prune.graph.records import Call, Labels
from lightning_prune.graph.sameness import clear_sameness, same_along, set_same_along
from lightning_prune.graph.vocabulary import Vocabulary

__all__ = ["note_write"]

_INTO_SOME = "is written into some positions of a tensor"


def note_write(tracer: Vocabulary, operator: Operator, call: Call) -> None:
    """Label a tensor by what an operator wrote into a view of it, and forget along which axes it was the same.

    Args:
        tracer: What is said goes there.
        operator: The operator, which works in place.
        call: Its call, once its rule has been followed.
    """
    for tensor in operator.written_among(call):
        if not operator.tells_sameness:
            clear_sameness(tensor)
        if tensor._base is not None:
            _Write(tracer, tensor, tensor._base).pass_on()


class _Write:
    """What was written into a view of a tensor.

    Args:
        tracer: What is said goes there.
        view: The view, with the labels of what was written.
        whole: The tensor.
    """

    def __init__(self, tracer: Vocabulary, view: Tensor, whole: Tensor) -> None:
        self.tracer = tracer
        self.view = view
        self.whole = whole
        self.axes = _axes_of_view(view, whole)

    def pass_on(self) -> None:
        """Label the tensor by what is in the view."""
        labels_of_whole = dict(self.tracer.all_labels(self.whole))
        labels_of_view = self.tracer.all_labels(self.view)
        for axis, labels in labels_of_view.items():
            whole_axis = self.axes.get(axis)
            if whole_axis is not None:
                before = labels_of_whole.setdefault(whole_axis, labels)
                self.tracer.tie(before, labels, _INTO_SOME)
            elif not self._are_from_whole(labels):
                self.tracer.mark_unprunable(labels, _INTO_SOME)
        self.tracer.set_labels(self.whole, labels_of_whole)
        self._keep_sameness()

    def _keep_sameness(self) -> None:
        """Let the tensor be the same along the axes along which it was, and what was written is."""
        same_in_view = same_along(self.view)
        still_same = set()
        for axis, whole_axis in self.axes.items():
            if axis in same_in_view:
                still_same.add(whole_axis)
        before = same_along(self.whole)
        set_same_along(self.whole, before & still_same)

    def _are_from_whole(self, labels: Labels) -> bool:
        """Tell whether the view had its labels from the tensor."""
        for along in self.tracer.labels_of([self.whole]):
            is_from_there = torch.isin(labels, along)
            if is_from_there.all():
                return True
        return False


def _axes_of_view(view: Tensor, whole: Tensor) -> dict[int, int]:
    """Return which axis of a tensor each axis of a view of it is, of those that the view has all positions of."""
    extents = _extents(whole)
    axes = {}
    for axis, extent in enumerate(_extents(view)):
        if extent in extents:
            axes[axis] = extents.index(extent)
    return axes


def _extents(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the size and the stride of each axis."""
    sizes_and_strides = zip(
        tensor.shape,
        tensor.stride(),
        strict=True,
    )
    return list(sizes_and_strides)
