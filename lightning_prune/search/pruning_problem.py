"""Pruning as a sequence of decisions: how wide each group is to be, one after the other, within a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune import criteria
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.scores import checked_scores
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.rl.base import Agent
from lightning_prune.rl.transition import Transition
from lightning_prune.search.width_bounds import WidthBounds

__all__ = ["OBSERVATION_SIZE", "Episodes", "Measure", "PruningProblem", "accuracy_of", "play"]

OBSERVATION_SIZE = 9

Measure = Callable[[Sequence[PruningPlan]], Tensor]
"""Given plans, returns the (plans,) reward of each."""


def accuracy_of(graph: ChannelGraph, batches: Iterable[Any], **settings: Any) -> Measure:
    """Return what rewards plans by the accuracy that the model has once they are applied, all in one evaluation.

    Args:
        graph: The traced model.
        batches: The batches to measure on.
        settings: As for `evaluate_candidates`: ``recalibrate`` takes batches to estimate the statistics of batch
            normalisation from, for each plan anew.
    """
    return lambda plans: evaluate_candidates(graph, plans, batches, **settings).accuracy


class PruningProblem:
    """Say what agents decide on and what they see; plans are made of what they decide.

    Each step decides on one group, in the order of the forward pass. The action is the fraction of its original
    channels that leaves; which channels leave is up to a criterion.

    Args:
        graph: The traced model, pruned already or not.
        keep: Fraction of the original cost that may stay.
        metric: What the fraction is of: ``"flops"``, ``"params"`` or ``"channels"``.
        criterion: What ranks the channels within a group; one that needs no data.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose.

    Raises:
        ValueError: If the budget cannot be reached, or a setting is out of range.

    Note:
        The nine numbers that an agent sees of a group follow Ganjdanesh et al., "Jointly Training and Pruning CNNs via
        Learnable Agent Guidance and Alignment" (CVPR 2024), as a reproduction has them: position, channels read,
        channels, stride, kernel size, cost of the group, cost spent so far, cost that is still open, and the last
        action. Interpretation: a group stands for a layer, each of the first five is scaled by its greatest value in
        the network, and costs are fractions of the original, exact for groups that share layers.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> problem = PruningProblem(trace(model, torch.zeros(1, 1)), keep=0.5, metric="params")
        >>> episodes = Episodes(problem, n=1)
        >>> while not episodes.ended:
        ...     episodes.step(torch.full((1, 1), 0.5))
        >>> problem.plan(episodes.widths[0]).widths
        {'0': 4, '1': 7}
    """

    def __init__(
        self,
        graph: ChannelGraph,
        *,
        keep: float = 0.5,
        metric: str = "flops",
        criterion: str | Mapping[str, Any] = "l1",
        round_to: int = 1,
        min_channels: int = 1,
        cap: float = 0.8,
    ) -> None:
        self.graph = graph
        self.cost = CostModel(graph, metric)
        self.bounds = WidthBounds(graph, self.cost, keep, round_to, min_channels, cap)
        self.sizes = self.cost.sizes
        self.scores = checked_scores(graph, criteria.score(graph, criterion))
        self.fixed = _seen_of_groups(graph, self.cost)

    def __len__(self) -> int:
        """Return the number of steps of an episode."""
        return len(self.sizes)

    def plan(self, widths: Sequence[int] | np.ndarray) -> PruningPlan:
        """Keep the best channels of each group.

        Args:
            widths: (groups,) channels that stay.
        """
        kept = {
            name: self.scores[name].argsort(descending=True, stable=True)[: int(width)]
            for name, width in zip(self.graph.groups, widths, strict=True)
        }
        made = self.graph.plan(kept)
        return PruningPlan(made.groups, made.shapes, self.bounds.report(np.asarray(widths)))


class Episodes:
    """Several episodes, each at the same step.

    Args:
        problem: What is decided on.
        n: Number of episodes.

    Attributes:
        widths: (n, groups) int64 widths; those of groups that are not decided on yet are 0.
        taken: The actions taken so far, (n, 1) each: the fraction that left.
    """

    def __init__(self, problem: PruningProblem, n: int) -> None:
        self.problem = problem
        self.widths = np.zeros((n, len(problem)), dtype=np.int64)
        self.position = 0
        self.taken = torch.zeros(n, 1)
        self._look()

    @property
    def ended(self) -> bool:
        """Whether all groups are decided on."""
        return self.position == len(self.problem)

    def step(self, action: Tensor) -> None:
        """Decide on the next group; actions out of bounds are clipped.

        Args:
            action: (n, 1) fraction of the channels that leaves.
        """
        bounds, size = self.problem.bounds, self.problem.sizes[self.position]
        for row, wish in enumerate((1 - action.flatten()).tolist()):
            limits = self._narrowest[row], self._widest[row]
            self.widths[row, self.position] = bounds.nearest(self.position, wish * size, *limits)
        self.taken = 1 - torch.from_numpy(self.widths[:, self.position] / size).float()[:, None]
        self.position += 1
        self._look()

    def _look(self) -> None:
        """Note what is seen, and what is allowed next."""
        bounds, cost, decided = self.problem.bounds, self.problem.cost, self.widths[:, : self.position]
        seen = []
        for widths in decided:
            spent = cost.of(np.concatenate([widths, bounds.least[self.position :]])) / cost.original
            whole = cost.of(np.concatenate([widths, bounds.most[self.position :]])) / cost.original
            seen.append([spent, whole - spent])
        fixed = self.problem.fixed[self.position].expand(len(decided), -1)
        self.observation = torch.cat([fixed, torch.tensor(seen, dtype=torch.float32), self.taken], dim=1)
        if self.ended:
            self.low, self.high = torch.zeros(len(decided), 1), torch.ones(len(decided), 1)
            return
        allowed = [bounds.after(widths) for widths in decided]
        self._narrowest, self._widest = zip(*allowed, strict=True)
        size = int(self.problem.sizes[self.position])
        self.low = 1 - torch.tensor(self._widest)[:, None] / size
        self.high = 1 - torch.tensor(self._narrowest)[:, None] / size


def play(
    problem: PruningProblem, agent: Agent, n: int, explore: bool = True, epoch: int = 0
) -> tuple[np.ndarray, list[Transition]]:
    """Let an agent decide in several episodes at once.

    Args:
        problem: What is decided on.
        agent: The agent.
        n: Number of episodes.
        explore: Whether the agent tries things out.
        epoch: The epoch of training.

    Returns:
        The (n, groups) widths, and the transitions of all steps, each of n environments and without reward.
    """
    episodes, transitions = Episodes(problem, n), []
    while not episodes.ended:
        before = {"observation": episodes.observation, "low": episodes.low, "high": episodes.high}
        action = agent.act(**before, explore=explore, epoch=epoch)
        episodes.step(action)
        after = {"next_observation": episodes.observation, "next_low": episodes.low, "next_high": episodes.high}
        taken = {"action": action, "reward": 0.0, "terminated": episodes.ended, "epoch": epoch}
        transitions.append(Transition(**before, **after, **taken))
    return episodes.widths, transitions


def _seen_of_groups(graph: ChannelGraph, cost: CostModel) -> Tensor:
    """Return what does not change of each group, and of the end: (groups + 1, 6), each from 0 to 1."""
    modules = dict(graph.model.named_modules())
    rows = []
    for position, group in enumerate(graph.groups.values()):
        made = group.out_slices[0]
        shape = graph.shapes[made.tensor]
        stride = getattr(modules.get(made.tensor.rpartition(".")[0]), "stride", 1)
        stride = stride[-1] if isinstance(stride, tuple) else stride
        read = shape[1 - made.axis] if len(shape) > 1 else 1
        kernel = shape[-1] if len(shape) > 2 else 1
        without = cost.sizes.copy()
        without[position] = 0
        share = 1 - cost.of(without) / cost.original
        rows.append([position, read, group.size, stride, kernel, share])
    seen = torch.tensor([*rows, [len(rows), 0, 0, 0, 0, 0]], dtype=torch.float32)
    seen[:, :5] /= seen[:, :5].amax(0)
    return seen
