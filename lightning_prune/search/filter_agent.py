"""An agent that looks at the filters of one layer and decides which of them stay."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.graph import ChannelGraph
from lightning_prune.rl.reinforce import Reinforce
from lightning_prune.rl.transition import Transition
from lightning_prune.search.width_bounds import WidthBounds

__all__ = ["FilterNetwork", "FilterSearch", "make_filter_agent"]

LONG = 24  # numbers in a filter, beyond which convolutions look at the filters
LARGEST = (64, 256)  # filters and numbers of each that convolutions look at; larger matrices are averaged down to that
CHANNELS = (32, 64, 64, 64)
HIDDEN = 24
LAST_GAIN = 0.01
_TINY = 1e-12


class FilterNetwork(nn.Module):
    """From the filters of a layer to the log-odds of keeping each of them.

    Filters of many numbers are looked at as one image, by convolutions of 7x7 and pooling in turns; others as they are.
    Two fully connected layers follow.

    Args:
        filters: Number of filters.
        length: Numbers in a filter.

    Example:
        >>> FilterNetwork(filters=10, length=72)(torch.zeros(1, 720)).shape
        torch.Size([1, 10])
    """

    def __init__(self, filters: int, length: int) -> None:
        super().__init__()
        self.shape = (1, filters, length)
        layers: list[nn.Module] = []
        inputs, height, width = 1, filters, length
        if length > LONG:
            height, width = min(filters, LARGEST[0]), min(length, LARGEST[1])
            layers.append(nn.AdaptiveAvgPool2d((height, width)))
        for outputs in CHANNELS if length > LONG else ():
            layers += [nn.Conv2d(inputs, outputs, 7, padding=3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            inputs, height, width = outputs, -(-height // 2), -(-width // 2)
        layers += [nn.Flatten(), nn.Linear(inputs * height * width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, filters)]
        self.layers = nn.Sequential(*layers)
        last = self.layers[-1]
        nn.init.orthogonal_(last.weight, LAST_GAIN)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    @override
    def forward(self, filters: Tensor) -> Tensor:
        """Return (..., filters) log-odds.

        Args:
            filters: (..., filters * length), each layer's filters one after the other.
        """
        return self.layers(filters.reshape(-1, *self.shape)).reshape(*filters.shape[:-1], -1)


def make_filter_agent(filters: Tensor, seed: int, samples: int = 5, keep: float = 0.9, **settings: Any) -> Reinforce:
    """Make the agent of a layer.

    Args:
        filters: (filters, length) weights of the layer.
        seed: Seed of all random numbers of the agent, those of the first weights included.
        samples: Number of draws that it learns from at once.
        keep: Probability of keeping a filter at the start.
        settings: As for `Reinforce`.

    Note:
        Huang et al., "Learning to Prune Filters in Convolutional Neural Networks" (WACV 2018), as reimplementations
        have it. That filters of more than 24 numbers count as long, and how wide layers are, is not known for sure;
        that large matrices are averaged down first, so that an agent costs less than the network it prunes, is a choice
        made here.

    Example:
        >>> agent = make_filter_agent(torch.eye(4), seed=0)
        >>> agent.act(torch.eye(4).flatten(), explore=False)
        tensor([1., 1., 1., 1.])
    """
    count, length = filters.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FilterNetwork(count, length)
    policy = {"name": "bernoulli", "initial_keep": keep}
    return Reinforce(
        count * length, count, seed, policy=policy, network=network, samples=samples, device=filters.device, **settings
    )


class FilterSearch:
    """Let an agent choose the channels of one group that stay, within a budget.

    Where the agent keeps more than the bounds allow, the least probable channels leave too; where it keeps fewer, the
    most probable ones stay too.

    Args:
        graph: The traced model, pruned already or not.
        name: The group. Its agent sees the filters that first make its channels, standardised.
        bounds: How wide groups may be.
        widths: (groups,) channels that stay; those of the groups before this one count.
        seed: Seed of the agent.
        settings: As for `make_filter_agent`.

    Example:
        >>> from lightning_prune import trace
        >>> from lightning_prune.planning.cost import CostModel
        >>> graph = trace(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.zeros(1, 2))
        >>> bounds = WidthBounds(graph, CostModel(graph, "channels"), keep=0.5)
        >>> search = FilterSearch(graph, "0", bounds, np.array([8]), samples=3)
        >>> drawn, kept = search.draw(3)
        >>> drawn.shape, [len(channels) for channels in kept]
        (torch.Size([3, 8]), [4, 4, 4])
    """

    def __init__(
        self, graph: ChannelGraph, name: str, bounds: WidthBounds, widths: np.ndarray, seed: int = 0, **settings: Any
    ) -> None:
        self.group, self.live, self.bounds = list(graph.groups).index(name), graph.kept(name), bounds
        self.limits = bounds.after(widths[: self.group])
        filters = graph.rows(name, graph.groups[name].out_slices[0]).float()
        filters = (filters - filters.mean()) / (filters.std() + _TINY)
        self.agent = make_filter_agent(filters, seed + self.group, **settings)
        self.seen = filters.flatten()

    @torch.no_grad()
    def draw(self, n: int, explore: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Draw choices of the agent.

        Args:
            n: How many.
            explore: Whether to try things out; otherwise the most probable choice is returned.

        Returns:
            The (n, channels) choices as drawn, 1 for channels that stay, and the channels that stay within the bounds.
        """
        drawn = self.agent.act(self.seen, low=torch.zeros(n, len(self.live)), explore=explore)
        policy = self.agent.policy(self.seen[None], self.agent.low, self.agent.high)
        ranked = (2 * drawn + policy.parameters().cpu()).argsort(dim=1, descending=True, stable=True)
        counts = [self.bounds.nearest(self.group, float(each.sum()), *self.limits) for each in drawn]
        return drawn, [self.live[order[:count]].sort().values for order, count in zip(ranked, counts, strict=True)]

    def learn(self, drawn: Tensor, rewards: Tensor) -> dict[str, float]:
        """Learn from what choices have earned; return losses by name.

        Args:
            drawn: (n, channels) choices as drawn.
            rewards: (n,) what they have earned.
        """
        self.agent.observe(Transition(self.seen, drawn, rewards, self.seen, terminated=True))
        return self.agent.update()
