"""Criterion for layers, sensitiveness: what accuracy it costs to damage them, one number per group."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.candidates import Candidate, Evaluate, Noise, classification, evaluate_candidates
from lightning_prune.criteria.norms import magnitude
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["DAMAGES", "LEVELS", "RATIOS", "check_settings", "layer_scores", "sensitiveness"]

DAMAGES = ("random", "magnitude", "noise")
RATIOS = ("inverse", "complement")
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

_FLOOR = 0.01  # of the greatest sensitiveness: a layer that shows none is not pruned as far as possible for that

Levels = Sequence[float]
Order = Callable[[str, Tensor], Tensor]
"""Given a group and its kept channels, returns in which order they are pruned: (kept channels,) places among them."""


def sensitiveness(
    graph: ChannelGraph,
    batches: Iterable[Any],
    damage: str = "random",
    levels: Sequence[float] = LEVELS,
    draws: int = 5,
    seed: int = 0,
    evaluate: Evaluate = classification,
    resume: str | Path | None = None,
    own_data: bool = False,
) -> dict[str, float]:
    """Return the accuracy that each group costs when it alone is damaged, as a fraction of the accuracy without damage.

    Args:
        graph: The traced model, run in evaluation mode: statistics of batch normalisation do not change.
        batches: Batches of data that the model was not trained on, on its device.
        damage: ``"random"`` prunes random channels, ``"magnitude"`` those of the smallest L1 norm, ``"noise"`` adds
            Gaussian noise to the weights that produce the channels.
        levels: How strong the damage is: the fractions of channels that are pruned, each in (0, 1), or the standard
            deviations of the noise as fractions of that of the weights, each above 0.
        draws: How many random damages are averaged at each level.
        seed: Seed of the random damages; the global random state does not change.
        evaluate: Given the model and a batch, returns loss and accuracy as means over its samples.
        resume: Folder in which results are noted, so that the same call goes on after an interruption.
        own_data: Whether each rank of a distributed run has batches of its own.

    Returns:
        One number in [0, 1] per group: the mean over levels and draws of ``max(0, (a - b) / a)``, with accuracy a
        before and b after the damage. A group of one channel, which cannot be pruned, counts the greatest.

    Raises:
        ValueError: If a setting is out of range, there is no batch, or the accuracy is 0 before any damage.

    Note:
        The idea is that of Lu et al., "SBPF: Sensitiveness Based Pruning Framework For Convolutional Neural Network On
        Image Classification" (2022), of which only the abstract was at hand: a layer counts by the accuracy
        under extra damage, and more filters are taken from layers that bear it. Everything else is an interpretation:
        the kinds of damage, levels and draws, this formula, and that coupled layers are damaged together.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]])), nn.init.eye_(model[2].weight)
        >>> batch = (torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]))
        >>> sensitiveness(trace(model, batch[0]), [batch], damage="magnitude", levels=[0.5])
        {'0': 0.5}
    """
    check_settings(damage, levels, draws)
    damages = list(_damages(graph, damage, levels, draws, seed))
    undamaged = graph.plan({})
    candidates = [undamaged, *(one.candidate for one in damages)]
    measured = evaluate_candidates(graph, candidates, batches, evaluate=evaluate, resume=resume, own_data=own_data)
    before = float(measured.accuracy[0])
    after = measured.accuracy[1:]
    if not before > 0:
        raise ValueError(
            f"The accuracy is {before} before any damage, so that damage cannot lower it; train the model first."
        )
    drops = (before - after) / before  # (damages,)
    drops = drops.clamp_min(0)
    drops_by_group: defaultdict[str, list[float]] = defaultdict(list)
    for one, drop in zip(damages, drops.tolist(), strict=True):
        drops_by_group[one.group].append(drop)
    means = {name: sum(values) / len(values) for name, values in drops_by_group.items()}
    greatest = max(means.values(), default=1.0)
    return {name: means.get(name, greatest) for name in graph.groups}


def layer_scores(measured: Mapping[str, float], ratio: str = "inverse") -> dict[str, float]:
    """Turn sensitiveness into the scores of layers that `plan_by_layer` takes.

    Args:
        measured: What `sensitiveness` returned.
        ratio: ``"inverse"``: groups are pruned in inverse proportion to their sensitiveness; ``"complement"``: in
            proportion to 1 - s / s_max, with s the sensitiveness.

    Returns:
        One number above 0 per group.

    Note:
        Both rules are interpretations, the first by analogy with the entropy of the same authors (see
        `lightning_prune.criteria.afie`). A hundredth of the greatest sensitiveness is added, so that a layer
        without any is not pruned as far as possible, nor the most sensitive one not at all.

    Example:
        >>> {name: round(value, 3) for name, value in layer_scores({"a": 0.2, "b": 0.1}).items()}
        {'a': 0.202, 'b': 0.102}
        >>> {name: round(value, 3) for name, value in layer_scores({"a": 0.2, "b": 0.1}, "complement").items()}
        {'a': 101.0, 'b': 1.98}
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be one of {', '.join(RATIOS)}; got {ratio!r}.")
    greatest = max(measured.values(), default=0.0)
    if greatest == 0:
        return dict.fromkeys(measured, 1.0)
    floor = _FLOOR * greatest
    if ratio == "inverse":
        return {name: value + floor for name, value in measured.items()}
    limit = greatest + floor
    return {name: 1 / (1 - value / limit) for name, value in measured.items()}


def check_settings(damage: str, levels: Sequence[float], draws: int) -> None:
    """Raise a ValueError unless the settings are in range."""
    if damage not in DAMAGES:
        raise ValueError(f"damage must be one of {', '.join(DAMAGES)}; got {damage!r}.")
    limit = float("inf") if damage == "noise" else 1.0
    in_range = all(0 < level < limit for level in levels)
    if not levels or not in_range:
        raise ValueError(
            f"levels of damage {damage!r} must be numbers above 0 and below {limit}; got {list(levels)!r}."
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be an integer of at least 1; got {draws!r}.")


@dataclass(frozen=True)
class _Damage:
    """A damaged copy of the model, and the group that is damaged in it."""

    group: str
    candidate: Candidate


def _damages(graph: ChannelGraph, damage: str, levels: Levels, draws: int, seed: int) -> Iterator[_Damage]:
    """Return damaged copies, always in the same order."""
    generator = torch.Generator().manual_seed(seed)
    scores = magnitude(graph) if damage == "magnitude" else {}

    def in_random_order(name: str, kept: Tensor) -> Tensor:
        return torch.randperm(len(kept), generator=generator)

    def smallest_first(name: str, kept: Tensor) -> Tensor:
        norms = scores[name][kept]
        return norms.argsort(stable=True)

    if damage == "noise":
        return _noises(graph, levels, draws, generator)
    if damage == "magnitude":
        return _prunings(graph, levels, 1, smallest_first)
    return _prunings(graph, levels, draws, in_random_order)


def _noises(graph: ChannelGraph, levels: Levels, draws: int, generator: torch.Generator) -> Iterator[_Damage]:
    """Yield copies with noise on the weights that produce a group."""
    for name in graph.groups:
        for level in levels:
            for _ in range(draws):
                seed = torch.randint(2**62, (), generator=generator)
                noise = Noise(name, level, int(seed))
                yield _Damage(name, noise)


def _prunings(graph: ChannelGraph, levels: Levels, draws: int, order: Order) -> Iterator[_Damage]:
    """Yield plans that prune the first channels of a group in some order; none for a group of one channel."""
    for name in graph.groups:
        kept = graph.kept(name)
        if len(kept) == 1:
            continue
        for level in levels:
            count = round(level * len(kept))
            count = min(max(count, 1), len(kept) - 1)
            for _ in range(draws):
                ordered = kept[order(name, kept)]
                plan = graph.plan({name: ordered[count:]})
                yield _Damage(name, plan)
