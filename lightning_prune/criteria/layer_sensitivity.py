"""What layers are given, and how much the outputs of the network depend on what they return."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.criteria.registry import Loss
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.finite import REMEDY, cause_in, not_finite_in
from lightning_prune.graph.nested import nested_tensors
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.compensating import run_on
from lightning_prune.surgery.compensation.copies import shared_twin, undisturbed
from lightning_prune.surgery.compensation.least_squares import Moments
from lightning_prune.surgery.compensation.operators import Linear, Step
from lightning_prune.surgery.compensation.runs import Watch
from lightning_prune.surgery.compensation.sampling import at_places, places_in
from lightning_prune.surgery.compensation.survey import names_of

__all__ = ["Sensitivity", "sensitivities"]


_AT_ONCE = 2**20  # numbers of the largest input: seven images of ImageNet

Places = Mapping[str, Tensor]
"""(channels, positions of a channel) where each group lies along the axis of a weight that consumes it."""


class Sensitivity:
    """Sums over batches of what one layer is given, and of the gradients at its output.

    Args:
        step: A call of the layer.
        places: Where the groups lie that it consumes.

    Attributes:
        in_axis: The axis of its weight along which it consumes channels.
    """

    def __init__(self, step: Linear, places: Places) -> None:
        self.in_axis = step.in_axis
        self._places = places
        self._inputs: dict[str, Moments] = {}
        self._means: dict[str, Moments] = {}
        self._samples = 0
        self._varying = torch.zeros(())
        self._uniform = torch.zeros(())

    def add_inputs(self, x: Tensor, number: int) -> None:
        """Add what the layer is given: (samples, in_channels, *spatial)."""
        channels = x.shape[1]
        places = places_in(x, numbers=channels, share=1, seed=number)
        chosen = at_places(x, places)
        means = x
        if x.dim() > 2:
            by_position = x.flatten(2)
            means = by_position.mean(2)
        for group, positions in self._places.items():
            inputs = chosen[:, positions.T]
            inputs = inputs.flatten(0, 1)
            _add(self._inputs, group, inputs)
            of_group = means[:, positions]
            of_group = of_group.mean(2)
            _add(self._means, group, of_group)

    def add_gradients(self, gradients: Tensor) -> None:
        """Add gradients at the output: (samples, out_channels, *spatial)."""
        if gradients.dim() == 2:
            gradients = gradients[:, :, None]
        by_position = gradients.flatten(2)
        positions = by_position.shape[2]
        squares = by_position.square().sum(2, dtype=torch.float64)
        sums = by_position.sum(2, dtype=torch.float64)
        uniform = sums.square()
        varying = squares - uniform / positions
        varying = varying.clamp_min(0)
        self._samples += len(by_position)
        self._varying = self._varying + varying.sum(0)
        self._uniform = self._uniform + uniform.sum(0)

    @property
    def is_seen(self) -> bool:
        """Whether gradients have come to it: outputs depend on what it returns."""
        return self._samples > 0

    @property
    def varying(self) -> Tensor:
        """(out_channels,) mean squared gradient, summed over positions, less that of its mean over them."""
        return self._varying / self._samples

    @property
    def uniform(self) -> Tensor:
        """(out_channels,) mean squared sum of the gradients over positions."""
        return self._uniform / self._samples

    def count(self, group: str) -> int:
        """Return how many samples and positions the covariance of a group is of."""
        return self._inputs[group].count

    def covariance(self, group: str) -> Tensor:
        """Return the covariance of channels over samples and positions: (channels, channels) float64."""
        return _covariance(self._inputs[group])

    def covariance_of_means(self, group: str) -> Tensor:
        """Return the covariance over samples of the means of channels over positions: (channels, channels) float64."""
        return _covariance(self._means[group])


def _add(moments: dict[str, Moments], group: str, rows: Tensor) -> None:
    none = rows[:, :0]
    if group not in moments:
        moments[group] = Moments.like(rows, none)
    moments[group].add(rows, none)


def _covariance(moments: Moments) -> Tensor:
    covariance, _, _ = moments.second(centred=True)
    return covariance


def sensitivities(
    graph: ChannelGraph, batches: Iterable[Any], loss: Loss | None, places: Mapping[str, Places]
) -> dict[str, Sensitivity]:
    """Run a copy of the model and return what was seen of each convolution and linear layer, by name of its weight.

    Args:
        graph: The traced model.
        batches: Batches of data.
        loss: Given the model and a batch, runs the model; None to call it with the batch.
        places: Where each group lies along the axes of the weights that consume it, by name of the weight.

    Raises:
        ValueError: If there is no batch, or the model returns NaN for one.
    """
    number = -1
    with undisturbed(graph.model), torch.enable_grad():
        watched = _Watched(graph, places)
        for number, batch in enumerate(batches):
            for part in _parts(batch):
                watched.add(part, loss)
            if watched.saw_nan:
                cause = cause_in(graph.model, [batch], number) or f"the model returns NaN for batch {number}"
                raise ValueError(f"Nothing can be ranked, as {cause}; {REMEDY}.")
    if number < 0:
        raise ValueError("There is no batch that anything could be ranked by.")
    return watched.found


def _parts(batch: Any) -> Iterator[Any]:
    """Yield a batch of large maps in parts, for activations are kept for the way back, and all other batches whole."""
    tensors = list(filter(_has_samples, tree_leaves(batch)))
    lengths = {len(tensor) for tensor in tensors}
    largest = max(tensors, key=Tensor.numel, default=torch.zeros(()))
    if largest.dim() < 4 or len(lengths) > 1:  # nothing says that its first axis is that of samples
        yield batch
        return
    samples = len(largest)
    size = _AT_ONCE * samples // largest.numel()
    size = max(1, size)
    for start in range(0, samples, size):
        stop = start + size
        yield tree_map(partial(_part, start=start, stop=stop), batch)


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _part(leaf: Any, start: int, stop: int) -> Any:
    if not _has_samples(leaf):
        return leaf
    return leaf[start:stop]


class _Watched:
    """A copy of the model that shows what its layers are given and return.

    Args:
        graph: The traced model.
        places: As for `sensitivities`.

    Attributes:
        found: What was seen, by name of the weight.
    """

    def __init__(self, graph: ChannelGraph, places: Mapping[str, Mapping[str, Tensor]]) -> None:
        own = named_tensors(graph.model)
        tensors = {name: _trained(tensor) for name, tensor in own.items()}
        self.found: dict[str, Sensitivity] = {}
        self._places = places
        self._names = names_of(tensors)
        self._copied = shared_twin(graph.model, tensors)
        self._traced = self._copied.get_submodule(graph.module)
        self._outputs: list[Tensor] = []
        self._edges: list[tuple[str, Linear, Any]] = []
        self._number = -1
        self._generator = torch.Generator().manual_seed(0)
        self._traced.register_forward_hook(self._note_output)

    @property
    def saw_nan(self) -> bool:
        """Whether an output of the last batch holds NaN."""
        return any(not_finite_in(output) == "NaN" for output in self._outputs)

    def add(self, batch: Any, loss: Loss | None) -> None:
        """Run one batch forward and, from a random projection of the outputs, backward."""
        self._outputs = []
        self._edges = []
        self._number += 1
        with Watch(self._names, self._note_step):
            run = loss or run_on
            run(self._copied, batch)
        if not self._edges or not self._outputs:
            return
        projected = list(map(self._projected, self._outputs))
        names, steps, edges = zip(*self._edges, strict=True)
        gradients = torch.autograd.grad(projected, edges, allow_unused=True)
        for name, step, gradient in zip(names, steps, gradients, strict=True):
            if gradient is None:
                continue
            layer = self.found[name]
            shaped = step.shaped(gradient)
            layer.add_gradients(shaped)

    def _projected(self, output: Tensor) -> Tensor:
        weights = torch.randn(output.shape, generator=self._generator)
        weights = weights.to(output)
        projected = output * weights
        return projected.sum()

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in nested_tensors(output):
            if tensor.requires_grad:
                self._outputs.append(tensor)

    def _note_step(self, name: str, step: Step, proceed: Callable[[], Any]) -> Any:
        output = proceed()
        # In convolution groups not every channel can make up for every other one.
        if name in self._places and isinstance(step, Linear) and step.groups == 1:
            if name not in self.found:
                self.found[name] = Sensitivity(step, self._places[name])
            layer = self.found[name]
            inputs = step.x.detach()
            layer.add_inputs(inputs, self._number)
            if output.requires_grad:  # which the model may have switched off
                # The place in the backward pass: what is changed in place afterwards has another.
                edge = get_gradient_edge(output)
                self._edges.append((name, step, edge))
        return output


def _trained(tensor: Tensor) -> Tensor:
    """Return a stand-in that gradients flow through."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.clone()
    has_gradient = tensor.is_floating_point()
    return nn.Parameter(tensor.detach(), requires_grad=has_gradient)
