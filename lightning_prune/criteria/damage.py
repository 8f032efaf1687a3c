"""Rank layers by how much accuracy is lost when they are damaged: one number per group, for `plan_by_layer`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.candidates import Candidate, Evaluate, Noise, classification, evaluate_candidates
from lightning_prune.criteria.norms import magnitude
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["DAMAGES", "LEVELS", "RATIOS", "check_settings", "layer_importance", "sensitiveness"]

DAMAGES = ("random", "magnitude", "noise")
RATIOS = ("inverse", "complement")
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

_FLOOR = 0.01  # of the greatest sensitiveness: a layer that shows none does not lose everything for that


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
        graph: The traced model, run in evaluation mode: statistics of batch normalisation stay as they are.
        batches: Batches of data that the model was not trained on, on its device.
        damage: ``"random"`` removes random channels, ``"magnitude"`` those of the smallest L1 norm, ``"noise"`` adds
            Gaussian noise to the weights that make the channels.
        levels: How strong the damage is: the fractions of channels that are removed, each in (0, 1), or the standard
            deviations of the noise as fractions of that of the weights, each above 0.
        draws: How many random damages are averaged at each level.
        seed: Seed of the random damages; the global random state is left alone.
        evaluate: Given the model and a batch, returns loss and accuracy as means over its examples.
        resume: Folder in which results are noted, so that the same call goes on after an interruption.
        own_data: Whether each rank of a distributed run has batches of its own.

    Returns:
        One number in [0, 1] per group: the mean over levels and draws of ``max(0, (a - b) / a)``, with accuracy a
        before and b after the damage. A group of one channel, from which none can be removed, counts the greatest.

    Raises:
        ValueError: If a setting is out of range, there is no batch, or the model has no accuracy to lose.

    Note:
        The idea is that of Lu et al., "SBPF: Sensitiveness Based Pruning Framework For Convolutional Neural Network On
        Image Classification" (2022), of which only the abstract was at hand: layer importance as accuracy under extra
        damage, with more filters taken from layers that bear it. Everything else is an interpretation: the kinds of
        damage, levels and draws, this formula, and that coupled layers are damaged together.

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
    damaged = list(_damages(graph, damage, levels, draws, seed))
    candidates = [graph.plan({}), *(candidate for _, candidate in damaged)]
    measured = evaluate_candidates(
        graph, candidates, batches, evaluate=evaluate, resume=resume, own_data=own_data
    ).accuracy
    before = float(measured[0])
    if not before > 0:
        raise ValueError(
            f"The accuracy is {before} before any damage, so that none can be lost; train the model first."
        )
    lost = ((before - measured[1:]) / before).clamp_min(0)
    found: dict[str, list[float]] = {}
    for (name, _), value in zip(damaged, lost.tolist(), strict=True):
        found.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    greatest = max(means.values(), default=1.0)
    return {name: means.get(name, greatest) for name in graph.groups}


def layer_importance(measured: Mapping[str, float], ratio: str = "inverse") -> dict[str, float]:
    """Turn sensitiveness into the importance that `plan_by_layer` takes.

    Args:
        measured: What `sensitiveness` returned.
        ratio: ``"inverse"``: groups lose in inverse proportion to their sensitiveness; ``"complement"``: in proportion
            to 1 - s / s_max, with s the sensitiveness.

    Returns:
        One number above 0 per group.

    Note:
        Both rules are interpretations, the first by analogy with the entropy of the same authors (see
        `lightning_prune.criteria.afie`). A hundredth of the greatest sensitiveness is added, so that a layer
        without any does not lose everything, nor the most sensitive one nothing.

    Example:
        >>> {name: round(value, 3) for name, value in layer_importance({"a": 0.2, "b": 0.1}).items()}
        {'a': 0.202, 'b': 0.102}
        >>> {name: round(value, 3) for name, value in layer_importance({"a": 0.2, "b": 0.1}, "complement").items()}
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
    return {name: 1 / (1 - value / (greatest + floor)) for name, value in measured.items()}


def check_settings(damage: str, levels: Sequence[float], draws: int) -> None:
    """Raise a ValueError unless the settings are in range."""
    if damage not in DAMAGES:
        raise ValueError(f"damage must be one of {', '.join(DAMAGES)}; got {damage!r}.")
    most = float("inf") if damage == "noise" else 1.0
    if not levels or not all(0 < level < most for level in levels):
        raise ValueError(f"levels of damage {damage!r} must be numbers above 0 and below {most}; got {list(levels)!r}.")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a whole number of at least 1; got {draws!r}.")


def _damages(
    graph: ChannelGraph, damage: str, levels: Sequence[float], draws: int, seed: int
) -> Iterator[tuple[str, Candidate]]:
    """Yield damaged copies with the group that is damaged, always in the same order."""
    generator = torch.Generator().manual_seed(seed)
    if damage == "noise":
        for name in graph.groups:
            for level in levels:
                for _ in range(draws):
                    yield name, Noise(name, level, int(torch.randint(2**62, (), generator=generator)))
        return
    norms = magnitude(graph) if damage == "magnitude" else {}

    def order(name: str, live: Tensor) -> Tensor:
        if damage == "magnitude":
            return live[norms[name][live].argsort(stable=True)]
        return live[torch.randperm(len(live), generator=generator)]

    yield from _removals(graph, levels, 1 if damage == "magnitude" else draws, order)


def _removals(
    graph: ChannelGraph, levels: Sequence[float], draws: int, order: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Candidate]]:
    """Yield plans that remove the first channels in some order."""
    for name in graph.groups:
        live = graph.kept(name)
        for level in levels if len(live) > 1 else ():
            count = min(max(round(level * len(live)), 1), len(live) - 1)
            for _ in range(draws):
                yield name, graph.plan({name: order(name, live)[count:]})
