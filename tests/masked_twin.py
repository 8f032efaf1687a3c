"""The masked twin: what masking means, written out by plain indexing, to judge the library's graph and surgery by.

Nothing of the library's masks and candidates is used, nor of its plans but to prune: of a graph only the in-channel
slices are read, and turned into positions here. There are two twins of a network. In one the weights that consume the
pruned channels are zero there; in the other the channels themselves are zero where such a layer takes them in, and its
weights are left alone.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan

Pruned = Mapping[str, list[int]]
"""Numbers of the channels that are pruned, by group."""

_CHANNEL_AXIS = {nn.Linear: -1, nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1}


@dataclass(frozen=True)
class Judgement:
    """How far the pruned network is from its twins, relative to the largest output.

    Attributes:
        by_weights: From the twin with zeros in its weights.
        by_inputs: From the twin whose layers take in zeros.
        masked: The outputs of the first twin.
    """

    by_weights: float
    by_inputs: float
    masked: list[Tensor]

    @property
    def apart(self) -> float:
        """The larger of both."""
        return max(self.by_weights, self.by_inputs)


@dataclass(frozen=True)
class Consumed:
    """Positions along one axis of one tensor that consume pruned channels."""

    tensor: str
    axis: int
    positions: list[int]


def draw_pruned(graph: ChannelGraph, names: list[str] | None = None) -> dict[str, list[int]]:
    """Draw channels to prune, of the mask-exact groups or of some by name: at least one, and some are kept."""
    pruned = {}
    for name, group in graph.groups.items():
        chosen = group.mask_exact if names is None else name in names
        if chosen and group.size > group.least:
            count = int(torch.randint(1, group.size - group.least + 1, ()))
            pruned[name] = sorted(torch.randperm(group.size)[:count].tolist())
    return pruned


def consumed(graph: ChannelGraph, pruned: Pruned) -> list[Consumed]:
    """Return where the graph says that pruned channels are consumed."""
    found = []
    for name, channels in pruned.items():
        for one in graph.groups[name].in_slices:
            positions: list[int] = []
            for channel in channels:
                if one.table:
                    positions += one.table[channel]
                else:
                    first = one.start + channel * one.step
                    positions += range(first, first + one.width)
            found.append(Consumed(one.tensor, one.axis, positions))
    return found


def plan_without(graph: ChannelGraph, pruned: Pruned) -> PruningPlan:
    """Return the library's plan to prune some channels."""
    kept = {}
    for name, channels in pruned.items():
        others = set(range(graph.groups[name].size)) - set(channels)
        kept[name] = torch.tensor(sorted(others))
    return graph.plan(kept)


def pruned_copy(model: nn.Module, graph: ChannelGraph, pruned: Pruned) -> nn.Module:
    """Return a copy of a network that the library prunes."""
    smaller = copy.deepcopy(model)
    lp.prune(smaller, plan_without(graph, pruned))
    return smaller


@contextmanager
def zeros_in_weights(model: nn.Module, places: list[Consumed]) -> Iterator[None]:
    """Let a network have zeros in some places of its weights for a while."""
    tensors = {}
    before: dict[str, Tensor] = {}
    for place in places:
        values = _tensor(model, place.tensor).data
        tensors[place.tensor] = values
        before.setdefault(place.tensor, values.clone())
        values[(slice(None),) * place.axis + (place.positions,)] = 0
    try:
        yield
    finally:
        for name, values in before.items():
            tensors[name].copy_(values)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


@contextmanager
def zeros_taken_in(model: nn.Module, places: list[Consumed], called: set[nn.Module]) -> Iterator[None]:
    """Let layers take in zeros for a while; where no layer takes channels in as they are, weights have zeros.

    Args:
        model: The network.
        places: Where pruned channels are consumed.
        called: The layers that the network calls; the weights of others are used by somebody else.
    """
    hooks, others = [], []
    for place in places:
        layers = _layers_with(model, place.tensor)
        if place.axis == 1 and all(layer in called and _takes_channels_in(layer) for layer in layers):
            for layer in layers:
                zero = partial(_zero, axis=_CHANNEL_AXIS[type(layer)], positions=place.positions)
                hooks.append(layer.register_forward_pre_hook(zero))
        else:
            others.append(place)
    try:
        with zeros_in_weights(model, others):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers_with(model: nn.Module, name: str) -> set[nn.Module]:
    """Return the modules that have a tensor, which may be shared."""
    wanted = _tensor(model, name)
    found = set()
    for layer in model.modules():
        if any(tensor is wanted for tensor in (*layer._parameters.values(), *layer._buffers.values())):
            found.add(layer)
    return found


def _takes_channels_in(layer: nn.Module) -> bool:
    """Tell whether a layer is one of the plain ones, without groups."""
    return type(layer) in _CHANNEL_AXIS and getattr(layer, "groups", 1) == 1


def _zero(layer: nn.Module, inputs: tuple[Tensor, ...], axis: int, positions: list[int]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return x.index_fill(axis, torch.tensor(positions, dtype=torch.int64), 0), *others


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors that a network gives, drawing the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        output = model(*inputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def called_layers(model: nn.Module, run: Callable[[], Any]) -> set[nn.Module]:
    """Return the plain layers that are called while a function runs."""
    called: set[nn.Module] = set()
    plain = [layer for layer in model.modules() if type(layer) in _CHANNEL_AXIS]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in plain]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Return how far outputs are apart, relative to the largest value of each.

    Raises:
        AssertionError: If they are not of the same shapes, or not finite.
    """
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape, f"{tuple(one.shape)} against {tuple(other.shape)}"
        assert bool(one.isfinite().all() and other.isfinite().all()), "the numbers are not finite"
        if one.numel() and one.is_floating_point():
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)))
    return worst


@torch.no_grad()
def judge(model: nn.Module, graph: ChannelGraph, pruned: Pruned, inputs: Any) -> Judgement:
    """Compare a network that the library prunes with its masked twins, in the mode that it is in; it stays as it is.

    Args:
        model: The network, which was never pruned; random numbers in all of its tensors let no mistake hide.
        graph: Its graph.
        pruned: The channels to prune, by group.
        inputs: Arguments of the network.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    places = consumed(graph, pruned)
    by_weights: list[Tensor] = []
    with zeros_in_weights(model, places):
        called = called_layers(model, lambda: by_weights.extend(outputs_of(model, arguments)))
    with zeros_taken_in(model, places, called):
        by_inputs = outputs_of(model, arguments)
    smaller = outputs_of(pruned_copy(model, graph, pruned), arguments)
    return Judgement(distance(by_weights, smaller), distance(by_inputs, smaller), by_weights)
