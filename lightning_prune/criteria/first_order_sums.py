"""Collecting what the Taylor criterion needs, backward pass by backward pass, wherever the passes come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria.watching import check_readable, sum_positions, unwatch, watch
from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.graph.substitution import named_tensors

__all__ = ["GRADIENT_FORMS", "VARIANTS", "Collector", "Totals", "make_collector"]

# Where the absolute value is taken: of each position, of each example, or of the mean over all data.
_ABSOLUTE = {"a": "example", "b": "position", "c": "data"}
GRADIENT_FORMS = ("gate", "sum_then_square", "square_then_sum")
VARIANTS = (*_ABSOLUTE, *GRADIENT_FORMS)


@dataclass
class Totals:
    """Sums over examples or steps; of several ranks they add up.

    Attributes:
        sums: (live channels,) float64 by group.
        counts: () float64 by group: over how many examples or steps.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the sums of one step, unless one of them is not finite: optimizers leave such steps out as well."""
        if not values:
            return
        # No branch on the outcome, to spare a synchronisation with the device.
        finite = torch.stack([value.isfinite().all() for value in values.values()]).all()
        for name, value in values.items():
            value = torch.where(finite, value, 0.0).double()
            self.sums[name] = value + self.sums[name].to(value.device) if name in self.sums else value
            counted = finite.double() * count
            self.counts[name] = counted + self.counts[name].to(value.device) if name in self.counts else counted

    def join(self, other: "Totals") -> None:
        """Add what another rank has summed."""
        for mine, others in ((self.sums, other.sums), (self.counts, other.counts)):
            for name, value in others.items():
                mine[name] = mine[name] + value if name in mine else value

    def unseen(self, graph: ChannelGraph) -> list[str]:
        """Name the groups of which there is nothing yet."""
        return [name for name in graph.groups if name not in self.counts or not self.counts[name] > 0]


class Collector:
    """Add to totals what each step tells about the channels.

    Args:
        graph: The traced model.
        variant: One of `VARIANTS`.
        totals: What to add to.
    """

    def __init__(self, graph: ChannelGraph, variant: str, totals: Totals) -> None:
        self.graph = graph
        self.variant = variant
        self.totals = totals

    def listen(self) -> None:
        """Start watching the model."""

    def stop(self) -> None:
        """Leave the model as it was."""

    def before_backward(self) -> None:
        """Prepare for the backward pass of the loss: gradients of anything else do not count."""

    def after_backward(self, scale: float) -> None:
        """Take what the backward pass of the loss has left.

        Args:
            scale: What gradients must be multiplied with to be those of the mean loss.
        """

    def before_step(self, gradients: Mapping[str, Tensor]) -> None:
        """Take the gradients that an optimizer steps with.

        Args:
            gradients: The gradient of each of its parameters that has one, by name.
        """

    def after_batch(self) -> None:
        """Finish what the optimizers have stepped with since the last call, which together is one step."""


def make_collector(graph: ChannelGraph, variant: str, totals: Totals) -> Collector:
    """Return the collector of a variant."""
    return (_Gradients if variant in GRADIENT_FORMS else _Effects)(graph, variant, totals)


class _Effects(Collector):
    """Variants a, b and c: activation times gradient where layers read, at the moment the gradient passes by."""

    def __init__(self, graph: ChannelGraph, variant: str, totals: Totals) -> None:
        super().__init__(graph, variant, totals)
        check_readable(graph, "The Taylor criterion")
        self._handles: list[RemovableHandle] = []
        # By number of examples, then by tensor that reads; None outside the backward pass of the loss.
        self._passes: dict[int, dict[str, Tensor]] | None = None

    def listen(self) -> None:
        self._handles = watch(self.graph, self._read)

    def stop(self) -> None:
        unwatch(self._handles)
        self._handles = []
        self._passes = None

    def before_backward(self) -> None:
        self._passes = {}

    def after_backward(self, scale: float) -> None:
        passes, self._passes = self._passes or {}, None
        examples = sum(passes)
        found = {name: self._sum_over_examples(group, passes) for name, group in self.graph.groups.items()}
        # A mean loss has divided the gradient of each example by their number.
        self.totals.add(
            {name: total * (scale * examples) for name, total in found.items() if total is not None}, examples
        )

    def _read(self, tensor: str, activation: Tensor, axis: int) -> Tensor | None:
        return self._tap(tensor, activation, axis) if torch.is_grad_enabled() else None

    def _tap(self, tensor: str, values: Tensor, axis: int) -> Tensor:
        """Let the gradient that flows back through one reader pass by."""
        # A node of its own, for the gradient through this reader alone; a leaf where nothing before it is trained.
        tapped = values.view_as(values) if values.requires_grad else values.detach().requires_grad_()
        tapped.register_hook(partial(self._collect, tensor, values.detach(), axis))
        return tapped

    def _collect(self, tensor: str, values: Tensor, axis: int, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # which stands for zeros
            return None
        if self._passes is None:
            # A factor on the channel would multiply this gradient too, and so act on a loss that is made of it.
            return self._tap(tensor, gradient, axis) if gradient.requires_grad else None
        # In half precision, gradients that the loss is scaled for leave no room for a product.
        precise = torch.promote_types(values.dtype, torch.float32)
        effect = sum_positions(self._absolute("position", values.to(precise) * gradient.detach()), axis)
        effects = self._passes.setdefault(len(effect), {})
        effects[tensor] = effects[tensor] + effect if tensor in effects else effect
        return None

    def _sum_over_examples(self, group: Group, passes: Mapping[int, Mapping[str, Tensor]]) -> Tensor | None:
        """Return the effect of each live channel of a group, summed over examples: (live channels,)."""
        channels = self.graph.kept(group.name)
        sums = []
        # Passes over equally many examples are passes over the same ones; others are examples of their own.
        for effects in passes.values():
            found = [
                effects[part.tensor][:, self.graph.positions_now(part, channels)]
                .unflatten(1, (len(channels), -1))
                .sum(2)
                for part in group.in_slices
                if part.tensor in effects
            ]
            if found:
                sums.append(self._absolute("example", torch.stack(found).sum(0)).sum(0))
        return torch.stack(sums).sum(0) if sums else None

    def _absolute(self, place: str, values: Tensor) -> Tensor:
        return values.abs() if _ABSOLUTE[self.variant] == place else values


class _Gradients(Collector):
    """The forms of 2019: weight times gradient, squared, once per step."""

    def __init__(self, graph: ChannelGraph, variant: str, totals: Totals) -> None:
        super().__init__(graph, variant, totals)
        self._step: dict[str, Tensor] = {}  # what the optimizers have told so far, by group

    def stop(self) -> None:
        self._step.clear()

    def before_step(self, gradients: Mapping[str, Tensor]) -> None:
        tensors = named_tensors(self.graph.model)
        products = {name: tensors[name].detach() * gradient for name, gradient in gradients.items()}
        for name, group in self.graph.groups.items():
            # A gate on a channel multiplies it wherever it is read, as would a factor on the weights that read it.
            parts = group.in_slices if self.variant == "gate" else group.out_slices + group.other_slices
            if self.variant == "gate" and not all(tensors[part.tensor].requires_grad for part in parts):
                continue  # what frozen weights pass on is not known from the others
            for part in parts:
                if part.tensor in products:
                    row = self.graph.rows(name, part, products).double()
                    value = (row.square() if self.variant == "square_then_sum" else row).sum(1)
                    self._step[name] = value + self._step[name].to(value.device) if name in self._step else value

    def after_batch(self) -> None:
        squared = self.variant == "square_then_sum"
        self.totals.add({name: value if squared else value.square() for name, value in self._step.items()}, 1)
        self._step.clear()
