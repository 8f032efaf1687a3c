"""Vocabulary of the rules: what a rule can ask about tensors, and what it can say about channels."""

from collections.abc import Iterable, Mapping, Sequence
from types import CodeType
from typing import Any, ClassVar

from torch import Tensor

from lightning_prune.graph.counts import channels_counted, find_computed
from lightning_prune.graph.frames import is_on_stack, running_line
from lightning_prune.graph.records import CostTerm, Known, Labels, LeastRequired, Note, Record, Split, SplitSite, Tie
from lightning_prune.graph.sameness import same_along

__all__ = ["Vocabulary"]


class Vocabulary:
    """What a rule can ask and say; a rule gets it as its tracer.

    Args:
        known: What earlier passes have shown.

    Attributes:
        record: What this pass has shown so far.
        modules: Names of the modules that run, outermost first.
        of_weights: Whether the operator that runs is given nothing but weights.
        sizes_written: The shape that a tensor is given now, as the code has it.
        grouped: Names of the weights of what works in groups.
        splits: Whether the operator that runs splits channels in a way that fits any number of them.
        parts_wanted: Into how many parts an axis is split, as the code has it; 0 where it does not tell.
        ties_of_splits: The places that split an axis, by the number of the tie that is due to each.
        free_modules: Names of the modules that split an axis into what may become of unequal size.
    """

    module_frame: ClassVar[CodeType]  # the function whose frame on the call stack is a module that runs

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known
        self.record = Record()
        self.modules: list[str] = []
        self.of_weights = False
        self.sizes_written: Sequence[int] = ()
        self.grouped = set(known.grouped)
        self.splits = False
        self.parts_wanted = 0
        self.ties_of_splits: dict[int, SplitSite] = {}
        self.free_modules: set[str] = set()

    # -- what a rule can ask ---------------------------------------------------------------------------------------

    @staticmethod
    def labels(tensor: Any, axis: int) -> Labels | None:
        """Return the labels along one axis of a tensor, or None where its positions cannot be pruned."""
        by_axis = getattr(tensor, "_channel_labels", None)
        if not by_axis:
            return None
        dimensions = tensor.dim()
        return by_axis.get(axis % dimensions if dimensions else 0)

    @staticmethod
    def all_labels(tensor: Any) -> dict[int, Labels]:
        """Return the labels of a tensor by axis; axes without labels are absent."""
        return getattr(tensor, "_channel_labels", None) or {}

    @classmethod
    def labels_of(cls, tensors: Iterable[Any]) -> list[Labels]:
        """Return the labels of all axes of some tensors."""
        return [labels for tensor in tensors for labels in cls.all_labels(tensor).values()]

    def axes(self, tensor: Tensor) -> list[Labels | int]:
        """Return, for each axis of a tensor, its labels or its size where it has none."""
        by_axis = self.all_labels(tensor)
        return [by_axis.get(axis, size) for axis, size in enumerate(tensor.shape)]

    @staticmethod
    def is_weight(tensor: Any) -> bool:
        """Tell whether a tensor is a parameter or was computed from nothing but parameters."""
        return getattr(tensor, "_is_weight", False)

    @staticmethod
    def is_of_network(tensor: Any) -> bool:
        """Tell whether the values of a tensor depend on weights or statistics of the network."""
        return getattr(tensor, "_is_of_network", False)

    @staticmethod
    def numbered(tensor: Any) -> list[Labels]:
        """Return the channels that a tensor holds numbers of, as those that were found to have the maximum."""
        return getattr(tensor, "_numbered", [])

    @staticmethod
    def shifts_zero(tensor: Any) -> bool:
        """Tell whether masking the weights that a tensor is made of does not mask the tensor."""
        return getattr(tensor, "_shifts_zero", False)

    @staticmethod
    def keeps_zero(tensor: Any) -> bool:
        """Tell whether a tensor is zero along channels all of whose weights are."""
        if getattr(tensor, "_is_weight", False):
            return not getattr(tensor, "_shifts_zero", False)
        return getattr(tensor, "_keeps_zero", False)

    @staticmethod
    def is_of_scores(tensor: Any) -> bool:
        """Tell whether a tensor was computed from products of queries and keys."""
        return getattr(tensor, "_is_of_scores", False)

    @staticmethod
    def name_of(tensor: Any) -> str:
        """Return the dotted name of a parameter or buffer, empty for any other tensor."""
        return getattr(tensor, "_dotted_name", "")

    def where(self) -> str:
        """Name the module that runs now."""
        return self.modules[-1] if self.modules else "the model"

    def line(self) -> str:
        """Name the line of code outside torch that runs now, as `` (file.py:12)``."""
        return str(running_line())

    def inside(self, code: CodeType) -> bool:
        """Tell whether the module that runs now has called a Python function, given by its code object."""
        return is_on_stack(code, self.module_frame)

    # -- what a rule can say ---------------------------------------------------------------------------------------

    @staticmethod
    def set_labels(tensor: Tensor, axes: Mapping[int, Labels | None]) -> None:
        """Give a tensor its labels by axis; None for an axis whose positions cannot be pruned."""
        known = {axis: labels for axis, labels in axes.items() if labels is not None}
        tensor._channel_labels = known  # type: ignore[attr-defined]

    @staticmethod
    def set_numbered(tensor: Tensor, channels: list[Labels]) -> None:
        """Say that a tensor holds numbers of channels, which are unprunable if anything uses them."""
        if channels:
            tensor._numbered = channels  # type: ignore[attr-defined]

    @staticmethod
    def shift_zero(tensor: Tensor) -> None:
        """Say that a tensor, and what is computed from it, is not zero where the weights are that it is made of."""
        tensor._shifts_zero = True  # type: ignore[attr-defined]

    @staticmethod
    def keep_zero(tensor: Tensor) -> None:
        """Say that a tensor is zero along channels all of whose weights are."""
        tensor._keeps_zero = True  # type: ignore[attr-defined]

    @staticmethod
    def set_of_scores(tensor: Tensor, is_so: bool = True) -> None:
        """Say whether a tensor is computed from products of queries and keys, as is what is computed from it."""
        tensor._is_of_scores = is_so  # type: ignore[attr-defined]

    @staticmethod
    def set_of_inputs(tensor: Tensor) -> None:
        """Say that the values of a tensor depend on the inputs of the network alone."""
        tensor._is_of_network = False  # type: ignore[attr-defined]

    def tie(self, first: Labels | None, second: Labels | None, why: str) -> None:
        """Say that the positions of two axes can only be pruned together, each with the one at the same place.

        Args:
            first: Labels of one axis, or None when its positions cannot be pruned.
            second: Labels of the other, of equal size.
            why: What to say when this keeps channels from being pruned.
        """
        if first is second:
            return
        if first is None or second is None:
            self.mark_unprunable(second if first is None else first, why)
            return
        tie = Tie(first, second, self.where(), why, self.of_weights)
        self.record.ties.append(tie)

    def tie_axes(self, first: Tensor, axis: int, second: Tensor, other_axis: int, why: str) -> Labels | None:
        """Tie axes of two tensors, unless one has no labels because all of its positions are the same there.

        Args:
            first: A tensor.
            axis: The axis of it.
            second: Another.
            other_axis: The axis of that, of equal size.
            why: What to say when this keeps channels from being pruned.

        Returns:
            The labels of the first, or of the second where it has none.
        """
        labels = self.labels(first, axis)
        other_labels = self.labels(second, other_axis)
        if labels is None:
            self.tie_to(other_labels, first, axis, why)
            return other_labels
        self.tie_to(labels, second, other_axis, why)
        return labels

    def tie_to(self, labels: Labels | None, tensor: Tensor, axis: int, why: str) -> None:
        """Tie labels to those along an axis of a tensor, unless that has none because all positions are the same."""
        other_labels = self.labels(tensor, axis)
        if other_labels is not None or axis % tensor.dim() not in same_along(tensor):
            self.tie(labels, other_labels, why)

    def tie_parts(self, labels: Labels, size: int) -> None:
        """Cut an axis into parts of some size; say that channels at equal places can only be pruned together."""
        if self.where() in self.free_modules:
            return
        first, others = labels[:size], labels[size:]
        if len(others):  # all parts at once: an image that is flattened with its channels has a hundred thousand
            self.tie(first.repeat(len(others) // size), others, "is split into parts")

    def split_axis(self, labels: Labels, sizes: Sequence[int], written: Sequence[int] = ()) -> int:
        """Say that an axis is split into several; returns the one that becomes shorter when channels are pruned.

        Code that splits channels writes one size down and computes the other; which is which shows only when the
        channels become fewer. Where the code does not tell, the last one is taken to be computed, until a trial has
        shown otherwise.

        Args:
            labels: The labels of all its positions.
            sizes: How long the axes are, outermost first.
            written: Their sizes as the code has them; nothing where these are not known.
        """
        self.splits = True
        site = SplitSite(running_line(), len(sizes))
        number_of_tie = len(self.record.ties)  # of the one that the rule is about to make
        self.ties_of_splits[number_of_tie] = site
        computed = find_computed(written, self.record)
        default = len(sizes) - 1 if computed is None else computed
        shorter = self.known.shrinking_axis.get(site, default)
        self.record.splits.append(Split(site, labels, shorter))
        return shorter

    def written_sizes(self, output: Tensor) -> Sequence[int]:
        """Return the shape of an output as the code has it that runs now, in plain numbers where that is not known."""
        return self.sizes_written if len(self.sizes_written) == output.dim() else output.shape

    def require_same_width(self, labels: Labels, sizes: Iterable[int]) -> None:
        """Say that channels are shaped by sizes; those of others, if there are as many, are to stay as many."""
        for size in sizes:
            counted = channels_counted(size, self.record)
            if counted is not None and counted is not labels and len(counted) == len(labels):
                tie = Tie(labels, counted, self.where(), "is shaped by the number of others")
                self.record.same_widths.append(tie)

    def mark_unprunable(self, labels: Labels | None, why: str) -> None:
        """Say that channels cannot be pruned, with the reason; the name of the module that runs is put before it."""
        if labels is not None:
            self.record.unprunable.append(Note(labels, self.where(), why))

    def mark_numbered(self, tensor: Any) -> None:
        """Say that the channels which a tensor holds numbers of cannot be pruned, because these are used."""
        for labels in self.numbered(tensor):
            self.mark_unprunable(labels, "has its channels told apart by number")
        self.record.not_mask_exact.extend(getattr(tensor, "_when_used", ()))

    def mark_when_used(self, tensor: Tensor, labels: Labels, why: str) -> None:
        """Say that pruning some channels is not the same as masking them if anything uses a tensor."""
        tensor._when_used = [Note(labels, self.where(), why)]  # type: ignore[attr-defined]

    def mark_not_mask_exact(self, labels: Labels | None, why: str) -> None:
        """Say that pruning these channels is not the same as masking what is read from them."""
        if labels is not None:
            self.record.not_mask_exact.append(Note(labels, self.where(), why))

    def mark_kind(self, labels: Labels | None, kind: str) -> None:
        """Say which kind of channels some are; see `lightning_prune.graph.Group`."""
        if labels is not None:
            self.record.kinds.append(Note(labels, self.where(), kind))

    def mark_summed(self, labels: Labels | None, tensors: Iterable[Tensor], why: str) -> None:
        """Say that products of some channels are summed up.

        Args:
            labels: The channels.
            tensors: The factors; where one of them is zero, so is the product.
            why: What to say where pruning these channels is not the same as masking all of their weights.
        """
        if labels is None:
            return
        if any(map(self.keeps_zero, tensors)):
            self.record.summed.append(labels)
        else:
            self.mark_not_mask_exact(labels, why)

    def mark_normed(self, labels: Labels | None, tensor: Tensor, why: str) -> None:
        """Say that a norm is taken over some channels.

        Args:
            labels: The channels.
            tensor: What has them.
            why: What to say where pruning these channels is not the same as masking them.
        """
        if labels is not None and self.keeps_zero(tensor):
            self.record.normed.append(Note(labels, self.where(), why))
        else:
            self.mark_not_mask_exact(labels, why)

    def mark_out_slice(self, labels: Labels | None) -> None:
        """Say that these positions of a weight produce channels."""
        if labels is not None:
            self.record.out_slices.append(labels)

    def mark_in_slice(self, labels: Labels | None) -> None:
        """Say that these positions of a weight consume channels."""
        if labels is not None:
            self.record.in_slices.append(labels)

    def mark_consumed(self, weight: Tensor, axis: int) -> None:
        """Mark the axis along which a weight consumes channels, and whether masking its parameters masks the weight."""
        labels = self.labels(weight, axis)
        self.mark_in_slice(labels)
        if self.shifts_zero(weight):
            why = "consumes channels by a weight that is not zero where its parameters are"
            self.mark_not_mask_exact(labels, why)

    def require_two(self, labels: Labels | None) -> None:
        """Say that an axis of a single channel would be dropped, or would have no statistics."""
        self.require_at_least(2, labels)

    def require_at_least(self, channels: int, labels: Labels | None) -> None:
        """Say that an axis must not have fewer channels than some number."""
        if labels is not None:
            required = LeastRequired(labels, channels)
            self.record.least_required.append(required)

    def computes_with(self, number: float) -> None:
        """Say that the operator computes with a number, which must be the same when channels are pruned."""
        self.record.operator_trace[-1] += (number,)

    def cost(self, coefficient: int, *axes: Labels | int) -> None:
        """Add operations: the coefficient times the length of every axis, given by its labels or as a number."""
        self.record.costs.append(CostTerm(coefficient, axes, self.where()))
