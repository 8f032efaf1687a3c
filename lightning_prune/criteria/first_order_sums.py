"""Sums that the Taylor criterion is made of, collected pass by pass, wherever the passes come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria.input_hooks import (
    check_watchable,
    places_made,
    positions_of_channels,
    sum_positions,
    unwatch,
    watch_inputs,
    watched_places,
)
from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.graph.nested import plain
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import Slice

__all__ = ["GRADIENT_FORMS", "VARIANTS", "Collector", "Totals", "make_collector"]

TensorsByName = dict[str, Tensor]


class _Absolute(Enum):
    """Of what the absolute value is taken."""

    POSITION = "each position"
    SAMPLE = "each sample"
    DATA = "the mean over all data"


_ABSOLUTE = {"a": _Absolute.SAMPLE, "b": _Absolute.POSITION, "c": _Absolute.DATA}
GRADIENT_FORMS = ("gate", "sum_then_square", "square_then_sum")
VARIANTS = (*_ABSOLUTE, *GRADIENT_FORMS)


@dataclass
class Totals:
    """Sums over samples or steps; of several ranks they add up.

    Attributes:
        sums: (kept channels,) float64 by group.
        counts: () float64 by group: over how many samples or steps.
        steps: () float64: how many ``"steps"`` there were, and of how many the ``"loss"`` or the ``"gradients"`` were
            not finite.
    """

    sums: TensorsByName = field(default_factory=dict)
    counts: TensorsByName = field(default_factory=dict)
    steps: TensorsByName = field(default_factory=dict)

    def begin_step(self, loss: Tensor) -> None:
        """Count a step, and whether its loss is finite."""
        finite = plain(loss.detach()).isfinite().all()
        _add(self.steps, "steps", torch.ones_like(finite, dtype=torch.float64))
        _add(self.steps, "loss", (~finite).double())

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the sums of one step, unless one of them is not finite: optimizers skip such steps as well.

        Args:
            values: (kept channels,) by group.
            count: Over how many samples or steps they are.
        """
        if not values:
            return
        # No branch on the outcome, to spare a synchronisation with the device.
        all_finite = [value.isfinite().all() for value in values.values()]
        finite = torch.stack(all_finite).all()
        _add(self.steps, "gradients", (~finite).double())
        counted = finite.double() * count
        for name, value in values.items():
            finite_value = torch.where(finite, value, 0.0).double()
            _add(self.sums, name, finite_value)
            _add(self.counts, name, counted)

    def join(self, other: "Totals") -> None:
        """Add what another rank has summed."""
        for name, value in other.sums.items():
            _add(self.sums, name, value)
        for name, count in other.counts.items():
            _add(self.counts, name, count)
        for name, count in other.steps.items():
            _add(self.steps, name, count)

    def not_finite(self) -> str:
        """Say in how many steps losses or gradients were not finite; nothing if all of them were."""
        counts = {name: int(count) for name, count in self.steps.items()}
        for what in ("loss", "gradients"):
            if counts.get(what):
                were = "was" if what == "loss" else "were"
                return f"the {what} {were} NaN or infinite in {counts[what]} of {counts.get('steps', 0)} steps"
        return ""

    def unseen(self, graph: ChannelGraph) -> list[str]:
        """Name the groups of which there is nothing yet."""
        return [name for name in graph.groups if not self._has_seen(name)]

    def _has_seen(self, group: str) -> bool:
        count = self.counts.get(group)
        return count is not None and bool(count > 0)


def _add(sums: TensorsByName, name: str, value: Tensor) -> None:
    """Add a value to a sum, on the device of the value."""
    if name in sums:
        value = value + sums[name].to(value.device)
    sums[name] = value


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
        """Stop watching the model, and forget the step that has begun."""

    def before_backward(self) -> None:
        """Prepare for the backward pass of the loss: gradients of anything else do not count."""

    def after_backward(self, scale: float) -> None:
        """Take what the backward pass of the loss has shown.

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
    """Return the collector of a variant.

    Raises:
        ValueError: If a layer that consumes channels cannot be watched, and the variant needs that.
    """
    kind = _Gradients if variant in GRADIENT_FORMS else _Effects
    return kind(graph, variant, totals)


class _Effects(Collector):
    """Variants a, b and c: activation times gradient where layers consume, at the moment the gradient passes by."""

    def __init__(self, graph: ChannelGraph, variant: str, totals: Totals) -> None:
        super().__init__(graph, variant, totals)
        check_watchable(graph, "The Taylor criterion")
        self._absolute = _ABSOLUTE[variant]
        self._handles: list[RemovableHandle] = []
        # (samples, inputs) effects by number of samples, then by weight; None outside the backward pass of the loss.
        self._effects: dict[int, TensorsByName] | None = None

    def listen(self) -> None:
        self._handles = watch_inputs(self.graph, self._on_input)

    def stop(self) -> None:
        unwatch(self._handles)
        self._handles = []
        self._effects = None

    def before_backward(self) -> None:
        self._effects = {}

    def after_backward(self, scale: float) -> None:
        effects = self._effects or {}
        self._effects = None
        samples = sum(effects)
        found = {}
        for name, group in self.graph.groups.items():
            total = self._sum_over_samples(group, effects)
            if total is not None:
                found[name] = total * (scale * samples)  # a mean loss has divided the gradients by their number
        self.totals.add(found, samples)

    def _on_input(self, weight: str, activation: Tensor, axis: int) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        return self._tap(weight, activation, axis)

    def _tap(self, weight: str, values: Tensor, axis: int) -> Tensor:
        """Let the gradient that flows back through one layer pass by."""
        # A node of its own, for the gradient through this layer alone; a leaf where nothing before it is trained.
        detached = plain(values.detach())  # what a subclass knows of its samples does not fit sums over them
        tapped = values.view_as(values) if values.requires_grad else values.detach().requires_grad_()
        tapped.register_hook(partial(self._on_gradient, weight, detached, axis))
        return tapped

    def _on_gradient(self, weight: str, values: Tensor, axis: int, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # which stands for zeros
            return None
        if self._effects is None:
            # A factor on the channel would multiply this gradient too, and so act on a loss that is made of it.
            return self._tap(weight, gradient, axis) if gradient.requires_grad else None
        # In half precision, gradients that the loss is scaled for have no room for a product.
        precise = torch.promote_types(values.dtype, torch.float32)
        products = values.to(precise) * plain(gradient.detach())
        if self._absolute is _Absolute.POSITION:
            products = products.abs()
        effect = sum_positions(products, axis)  # (samples, inputs)
        by_weight = self._effects.setdefault(len(effect), {})
        _add(by_weight, weight, effect)
        return None

    def _sum_over_samples(self, group: Group, effects: Mapping[int, TensorsByName]) -> Tensor | None:
        """Return the effect of each kept channel of a group, summed over samples: (kept channels,)."""
        sums = []
        # Passes over equally many samples are passes over the same ones; others are samples of their own.
        for by_weight in effects.values():
            by_layer = self._effects_of_channels(group, by_weight)
            if by_layer:
                by_sample = torch.stack(by_layer).sum(0)  # (samples, kept channels)
                if self._absolute is _Absolute.SAMPLE:
                    by_sample = by_sample.abs()
                sums.append(by_sample.sum(0))
        return torch.stack(sums).sum(0) if sums else None

    def _effects_of_channels(self, group: Group, by_weight: TensorsByName) -> list[Tensor]:
        """Return (samples, kept channels) for each layer that consumes the group."""
        effects = []
        for key, places in watched_places(self.graph, group).items():
            if key in by_weight:
                inputs = positions_of_channels(self.graph, group.name, places)
                of_channels = by_weight[key][:, inputs]  # (samples, kept channels, inputs of each)
                effects.append(of_channels.sum(2))
        return effects


class _Gradients(Collector):
    """The forms of 2019: weight times gradient, squared, once per step."""

    def __init__(self, graph: ChannelGraph, variant: str, totals: Totals) -> None:
        super().__init__(graph, variant, totals)
        self._step: TensorsByName = {}  # what the optimizers have told so far, by group

    def stop(self) -> None:
        self._step.clear()

    def before_step(self, gradients: Mapping[str, Tensor]) -> None:
        tensors = named_tensors(self.graph.model)
        products = {}
        for name, gradient in gradients.items():
            weight = tensors[name].detach()
            products[name] = weight * gradient
        for group in self.graph.groups.values():
            if self._is_known(group, tensors):
                self._add_products(group, products)

    def _is_known(self, group: Group, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether all that counts is trained: what frozen weights pass on is not known from the others."""
        if self.variant != "gate":
            return True
        return all(tensors[place.tensor].requires_grad for place in group.consuming)

    def _add_products(self, group: Group, products: Mapping[str, Tensor]) -> None:
        # A gate on a channel multiplies it wherever it is consumed, as would a factor on the weights that consume it.
        places: Sequence[Slice] = group.consuming
        if self.variant != "gate":
            places = group.out_slices + group.other_slices
        elif not places:  # or wherever it is produced, as would a factor on all that is stored of it there
            places = self._stored_where_made(group)
        for place in places:
            if place.tensor in products:
                rows = self.graph.rows(group.name, place, products).double()  # (kept channels, weights of each)
                if self.variant == "square_then_sum":
                    rows = rows.square()
                _add(self._step, group.name, rows.sum(1))

    def _stored_where_made(self, group: Group) -> list[Slice]:
        """Return the weights and biases of the layers that a group is last seen in before it is consumed."""
        modules = set()
        for place in places_made(self.graph, group):
            module, _, _ = place.tensor.rpartition(".")
            modules.add(module)
        stored = []
        for place in group.out_slices + group.other_slices:
            module, _, _ = place.tensor.rpartition(".")
            if module in modules:
                stored.append(place)
        return stored

    def after_batch(self) -> None:
        sums = self._step
        if self.variant != "square_then_sum":
            sums = {name: value.square() for name, value in sums.items()}
        self.totals.add(sums, 1)
        self._step = {}
