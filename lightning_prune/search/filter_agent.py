"""An agent that looks at the filters of one layer and decides which of them are kept."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.finite import REMEDY, not_finite_in
from lightning_prune.rl.reinforce import Reinforce
from lightning_prune.rl.transitions import Transition
from lightning_prune.search.width_bounds import WidthBounds

__all__ = ["FilterNetwork", "FilterSearch", "make_filter_agent"]

LONG_FILTER = 24  # numbers in a filter, beyond which convolutions look at the filters
LARGEST_IMAGE = (64, 256)  # filters and numbers of each that convolutions see; larger matrices are averaged down to it
CONV_CHANNELS = (32, 64, 64, 64)
HIDDEN_SIZE = 24
OUTPUT_GAIN = 0.01
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
        self.image_shape = (1, filters, length)
        layers: list[nn.Module] = []
        features = filters * length
        if length > LONG_FILTER:
            convolutions, features = _convolutions(filters, length)
            layers.extend(convolutions)
        hidden = nn.Linear(features, HIDDEN_SIZE)
        output = nn.Linear(HIDDEN_SIZE, filters)
        layers.extend([nn.Flatten(), hidden, nn.ReLU(), output])
        self.layers = nn.Sequential(*layers)
        nn.init.orthogonal_(output.weight, OUTPUT_GAIN)
        nn.init.zeros_(output.bias)

    @override
    def forward(self, filters: Tensor) -> Tensor:
        """Return (..., filters) log-odds.

        Args:
            filters: (..., filters * length), each layer's filters one after the other.
        """
        images = filters.reshape(-1, *self.image_shape)
        log_odds = self.layers(images)
        return log_odds.reshape(*filters.shape[:-1], -1)


def _convolutions(filters: int, length: int) -> tuple[list[nn.Module], int]:
    """Return the layers that look at filters as an image, and the number of features that they make of it."""
    height = min(filters, LARGEST_IMAGE[0])
    width = min(length, LARGEST_IMAGE[1])
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d((height, width))]
    channels = 1
    for out_channels in CONV_CHANNELS:
        layers.append(nn.Conv2d(channels, out_channels, 7, padding=3))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        channels = out_channels
        height = (height + 1) // 2
        width = (width + 1) // 2
    return layers, channels * height * width


def make_filter_agent(filters: Tensor, seed: int, samples: int = 5, keep: float = 0.9, **settings: Any) -> Reinforce:
    """Make the agent of a layer.

    Args:
        filters: (filters, length) weights of the layer.
        seed: Seed of all random numbers of the agent, those of the first weights included.
        samples: Number of choices that it learns from at once.
        keep: Probability of keeping a filter at the start.
        settings: As for `ReinforceSettings`.

    Note:
        Huang et al., "Learning to Prune Filters in Convolutional Neural Networks" (WACV 2018), as reimplementations
        have it. That filters of more than 24 numbers count as long, and how wide layers are, is not known for sure;
        that large matrices are averaged down first, so that an agent costs less than the network it prunes, is a choice
        made here.

    Example:
        >>> agent = make_filter_agent(torch.eye(4), seed=0)
        >>> agent.act(torch.eye(4).flatten(), greedy=True)
        tensor([1., 1., 1., 1.])
    """
    count, length = filters.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FilterNetwork(count, length)
    return Reinforce(
        observation_size=count * length,
        action_size=count,
        seed=seed,
        policy={"name": "bernoulli", "initial_probability": keep},
        network=network,
        n_episodes=samples,
        device=filters.device,
        **settings,
    )


class FilterSearch:
    """Let an agent choose the channels of one group that are kept, within a budget.

    Where the agent keeps more than the bounds allow, the least probable channels are pruned too; where it keeps fewer,
    the most probable ones are kept too.

    Args:
        graph: The traced model, pruned already or not.
        name: The group. Its agent sees the filters that first make its channels, standardised.
        bounds: How wide groups may be.
        widths: (groups,) channels that are kept; those of the groups before this one count.
        seed: Seed of the agent.
        settings: As for `make_filter_agent`.

    Attributes:
        channels: (channels,) original indices of the channels that the agent decides on.
        limits: The least and the greatest number of channels that may be kept.

    Example:
        >>> from lightning_prune import trace
        >>> from lightning_prune.planning.cost import CostModel
        >>> graph = trace(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.zeros(1, 2))
        >>> bounds = WidthBounds(graph, CostModel(graph, "channels"), keep=0.5)
        >>> search = FilterSearch(graph, "0", bounds, np.array([8]), samples=3)
        >>> choices, kept = search.draw(3)
        >>> choices.shape, [len(channels) for channels in kept]
        (torch.Size([3, 8]), [4, 4, 4])
    """

    def __init__(
        self, graph: ChannelGraph, name: str, bounds: WidthBounds, widths: np.ndarray, seed: int = 0, **settings: Any
    ) -> None:
        self.group = list(graph.groups).index(name)
        self.channels = graph.kept(name)
        self.bounds = bounds
        self.limits = bounds.after(widths[: self.group])
        out_slice = graph.groups[name].out_slices[0]
        filters = graph.rows(name, out_slice).float()
        found = not_finite_in(filters)
        if found:
            raise ValueError(f"The agent of group {name!r} sees {found} in {out_slice.tensor!r}; {REMEDY}.")
        filters = _standardised(filters)
        self.agent = make_filter_agent(filters, seed + self.group, **settings)
        self.observation = filters.flatten()

    @torch.no_grad()
    def draw(self, n: int, greedy: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Draw choices of the agent.

        Args:
            n: How many.
            greedy: Whether to return the most probable choice; otherwise choices are sampled.

        Returns:
            The (n, channels) choices as drawn, 1 for channels that are kept, and the kept channels within the bounds.
        """
        nothing_fixed = torch.zeros(n, len(self.channels))
        choices = self.agent.act(self.observation, low=nothing_fixed, greedy=greedy)
        policy = self.agent.policy(self.observation[None], self.agent.low, self.agent.high)
        probabilities = policy.parameters()[0].cpu()  # (channels,)
        kept = [self._within_budget(choice, probabilities) for choice in choices]
        return choices, kept

    def _within_budget(self, choice: Tensor, probabilities: Tensor) -> Tensor:
        """Return the channels that are kept for a choice, (channels,), and the probability of keeping each."""
        # What was chosen comes first, and within that what is more probable.
        preference = 2 * choice + probabilities
        order = preference.argsort(descending=True, stable=True)
        narrowest, widest = self.limits
        width = self.bounds.nearest(self.group, float(choice.sum()), narrowest, widest)
        channels = self.channels[order[:width]]
        return channels.sort().values

    def learn(self, choices: Tensor, rewards: Tensor) -> dict[str, float]:
        """Learn from what choices have earned; return losses by name.

        Args:
            choices: (n, channels) choices as drawn.
            rewards: (n,) what they have earned.
        """
        transition = Transition(self.observation, choices, rewards, self.observation, terminated=True)
        self.agent.observe(transition)
        return self.agent.update()


def _standardised(filters: Tensor) -> Tensor:
    return (filters - filters.mean()) / (filters.std() + _TINY)
