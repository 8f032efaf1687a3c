"""Parameters that no rule has led to channels: they are named among what cannot be pruned, with the reason."""

from collections.abc import Mapping

from numpy import ndarray

from lightning_prune.graph.channel_graph import Group
from lightning_prune.graph.groups import Grouping, marked
from lightning_prune.graph.records import Record
from lightning_prune.graph.run import Forward
from lightning_prune.graph.slots import module_of

__all__ = ["name_the_rest"]


def name_the_rest(forward: Forward, grouping: Grouping, groups: Mapping[str, Group], record: Record) -> None:
    """Name every parameter of more than one dimension that neither has channels of a group nor produces others.

    Args:
        forward: The forward pass.
        grouping: Gets what else cannot be pruned.
        groups: All groups that can be pruned.
        record: What the full network showed.
    """
    is_in = marked(forward.labelled.count, record.in_slices)
    for tensor in _unnamed(forward, grouping, groups):
        module = module_of(tensor)
        if tensor in record.used:
            axis, reason = _first_reason(forward, grouping, tensor, is_in)
        else:
            axis, reason = 0, f"{module}: is used by no operator of the forward pass in evaluation mode"
        if (module, reason) not in grouping.unprunable.reasons:
            grouping.unprunable.add(module, forward.shapes[tensor][axis], reason)


def _unnamed(forward: Forward, grouping: Grouping, groups: Mapping[str, Group]) -> list[str]:
    """Return the parameters of more than one dimension that are named nowhere."""
    named = set(grouping.unprunable.tensors)
    for group in groups.values():
        named.update(one.tensor for one in group.slices)
    reached = {id(parameter) for parameter in forward.submodule.parameters()}
    unnamed = []
    for name, tensor in forward.tensors.items():
        if id(tensor) in reached and tensor.dim() > 1 and name not in named:
            unnamed.append(name)
    return unnamed


def _first_reason(forward: Forward, grouping: Grouping, tensor: str, is_in: ndarray) -> tuple[int, str]:
    """Return the first axis of a tensor that cannot be pruned for a reason, and the reason.

    The axes along which it consumes channels come last: what it produces counts more.
    """
    module = module_of(tensor)
    shape = forward.shapes[tensor]
    labels_by_axis = forward.labelled.labels(tensor)
    in_axes = []
    for axis, labels in labels_by_axis.items():
        consumes = is_in[labels.numpy()]
        if consumes.all():
            in_axes.append(axis)
    other_axes = [axis for axis in range(len(shape)) if axis not in in_axes]
    first = (other_axes + in_axes)[0]
    if 0 in shape:
        return first, f"{module}: has no channels"
    if shape[first] == 1 and (in_axes or not labels_by_axis):
        return first, f"{module}: has a single channel"
    for axis in other_axes + in_axes:
        if axis in labels_by_axis:
            reason = grouping.why_unprunable.about(labels_by_axis[axis].numpy())
            if reason:
                return axis, reason
    return first, f"{module}: produces no channels"
