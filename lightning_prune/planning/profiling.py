"""Profile of a network: from timed runs it is learnt how long a forward pass takes at any widths of the groups."""

import itertools
from collections.abc import Sequence

import numpy as np

from lightning_prune.graph.channel_graph import Axis, ChannelGraph, Term
from lightning_prune.planning.cost import Products
from lightning_prune.planning.profile_cache import load_terms, store_terms
from lightning_prune.planning.segments import Segment, time_segments
from lightning_prune.progress import progress

__all__ = ["profile"]

_MOST_FEATURES = 6  # of more, some say the same
_STEP, _STEP_FROM = 8, 64  # groups of so many channels or more are tried at multiples of the step
_SHORTEST = 1e-6  # milliseconds: times are divided by


def profile(graph: ChannelGraph, samples: int = 32, runs: int = 3) -> None:
    """Measure how the time of a forward pass depends on the widths of the groups.

    The network runs at random widths, on the device and with the example inputs it was traced for. The time between
    the start of one layer and the start of the next is taken to be a constant, plus something for each channel that
    comes in and goes out, plus something for each operation; all of them at least 0, fitted to what was measured. The
    result is kept in the user's cache directory, by device, versions, number of threads and architecture.

    Args:
        graph: The traced model; gets ``terms["latency"]``, in milliseconds.
        samples: Number of networks of random widths, besides the original one.
        runs: Number of timed runs of each; the fastest counts.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> from lightning_prune.planning.cost import CostModel
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> graph = trace(model, torch.zeros(1, 3, 32, 32))
        >>> profile(graph, samples=4, runs=1)
        >>> CostModel(graph, "latency").original > 0
        True
    """
    terms = load_terms(graph)
    if terms is None:
        terms = _measured_terms(graph, samples, runs)
        store_terms(graph, terms)
    graph.terms["latency"] = terms


def _measured_terms(graph: ChannelGraph, samples: int, runs: int) -> list[Term]:
    """Time the network at random widths, and fit the time of each of its segments."""
    sizes = np.array([group.size for group in graph.groups.values()], dtype=np.int64)
    generator = np.random.default_rng(0)
    tried = [sizes, *(_random_widths(sizes, generator) for _ in range(samples))]
    measured: list[dict[Segment, float]] = []
    with progress(f"Timing {type(graph.model).__name__} at random widths", len(tried)) as work:
        for widths in tried:
            width_of = dict(zip(graph.groups, widths.tolist(), strict=True))
            measured.append(time_segments(graph, width_of, runs))
            work.advance()
    terms: list[Term] = []
    for segment in measured[0]:
        times = np.array([times_of_all.get(segment, 0.0) for times_of_all in measured])
        terms += _fitted(graph, segment, times, tried)
    return terms


def _random_widths(sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw the width of each group: neighbours must differ, or what comes in is not told from what goes out."""
    fractions = generator.uniform(0.1, 1, len(sizes))
    widths = (sizes * fractions).round().astype(np.int64)
    step = np.where(sizes >= _STEP_FROM, _STEP, 1)
    least = np.minimum(step, sizes)
    return np.maximum(widths // step * step, least)


def _fitted(graph: ChannelGraph, segment: Segment, times: np.ndarray, tried: Sequence[np.ndarray]) -> list[Term]:
    """Fit the time of one segment: a constant, the length of each axis, and the products of axes.

    Args:
        graph: The traced model.
        segment: The segment.
        times: (networks,) milliseconds.
        tried: (groups,) widths of each network, the original one first.
    """
    features = _features(graph, segment.module)
    products = Products(features, list(graph.groups))
    values = np.stack([products.of(widths) for widths in tried]).astype(float)  # (networks, features)
    units = values[0].clip(min=1)  # what a feature comes to in the original network
    relative = values / units / times[:, None].clip(min=_SHORTEST)  # relative errors count
    weights = _non_negative_fit(relative, np.ones(len(times))) / units
    return [
        Term(weight, axes, segment.module)
        for weight, axes in zip(weights.tolist(), features, strict=True)
        if weight > 0
    ]


def _features(graph: ChannelGraph, module: str) -> list[tuple[Axis, ...]]:
    """Return the products of axes that the time of a module may grow with; the empty one is the constant."""
    features: dict[tuple[Axis, ...], None] = {(): None}
    for term in graph.terms["flops"]:
        varying = tuple(axis for axis in term.axes if axis.groups)
        if term.module == module and varying:
            features.update({(axis,): None for axis in varying})
            features[varying] = None
    return list(features)[:_MOST_FEATURES]


def _non_negative_fit(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solve least squares with coefficients of at least 0, by trying every choice of the few that are not 0.

    Args:
        matrix: (rows, coefficients).
        target: (rows,).

    Returns:
        (coefficients,).
    """
    count = matrix.shape[1]
    best = np.zeros(count)
    least_error = float(target @ target)
    for chosen in _choices(count):
        found = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
        error = float(((matrix[:, chosen] @ found - target) ** 2).sum())
        if error < least_error and bool((found >= 0).all()):
            least_error = error
            best = np.zeros(count)
            best[chosen] = found
    return best


def _choices(count: int) -> list[list[int]]:
    """Return every choice of at least one of some coefficients, the smallest first."""
    sizes = range(1, count + 1)
    return [list(chosen) for size in sizes for chosen in itertools.combinations(range(count), size)]
