"""Profile of a network: from timed runs it is learnt how long a forward pass takes at any widths of the groups."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_prune.graph.channel_graph import Axis, ChannelGraph, Term
from lightning_prune.planning.cost import Products, integers
from lightning_prune.planning.profile_cache import load_terms, store_terms
from lightning_prune.planning.segments import Segment, time_segments
from lightning_prune.planning.timing import device_of
from lightning_prune.progress import progress

__all__ = ["fitted", "profile", "random_widths"]

_MOST_FEATURES = 8  # of more, some say the same
_ORIGINAL_EVERY = 4  # networks, one of which is the original again
_STEP = 8
_STEP_FROM = (16, 64)  # groups of so many channels or more are tried at multiples of the step, in turns
_MULTIPLES = (1, 8, 16, 32)  # channels that kernels of CPUs and GPUs work on at once
_BLOCK = 16  # channels that some runtimes keep side by side: what does not fill its blocks is copied
_SHORTEST = 1e-6  # milliseconds: times are divided by


def profile(graph: ChannelGraph, samples: int = 32, runs: int = 3) -> None:
    """Measure how the time of a forward pass depends on the widths of the groups.

    The network runs at random widths, on the device and with the example inputs it was traced for. The time between
    the start of one layer and the start of the next is taken to be a constant, plus something for each channel that
    comes in and goes out, plus something for each operation; all of them at least 0, fitted to what was measured.
    Kernels work on blocks of channels, of which the last may be partly empty: lengths are rounded up to multiples of
    1, 8, 16 or 32, whichever fits best, and channels that do not fill blocks of 16 may take longer. The original
    network counts as much as all others together, since predictions are fractions of its time. The result is kept in
    the user's cache directory, by device, versions, number of threads and architecture.

    Args:
        graph: The traced model; gets ``terms["latency"]``, in milliseconds.
        samples: Number of networks of random widths, besides the original one.
        runs: Number of timed runs of each; the fastest counts.

    Raises:
        ValueError: If the model is on the meta device.

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
    if not graph.groups:  # the time depends on no width
        graph.terms["latency"] = []
        return
    device_of(graph.model)  # raises if the network cannot run
    terms = load_terms(graph)
    if terms is None:
        terms = _measured_terms(graph, samples, runs)
        store_terms(graph, terms)
    graph.terms["latency"] = terms


def _measured_terms(graph: ChannelGraph, samples: int, runs: int) -> list[Term]:
    """Time the network at random widths, and fit the time of each of its segments."""
    tried = _tried(graph, samples)
    measured = _timed(graph, tried, runs)
    terms: list[Term] = []
    for segment in measured[0]:
        times = [times_of_network.get(segment, 0.0) for times_of_network in measured]
        terms += fitted(graph, segment, np.array(times), tried)
    return terms


def random_widths(graph: ChannelGraph, samples: int) -> list[dict[str, int]]:
    """Return the original widths of a network and some random ones, by group name.

    Args:
        graph: The traced model.
        samples: Number of random ones.
    """
    return [_by_name(graph, widths) for widths in _tried(graph, samples)]


def _by_name(graph: ChannelGraph, widths: np.ndarray) -> dict[str, int]:
    """Return widths by the names of the groups.

    Args:
        graph: The traced model.
        widths: (groups,) channels that are kept.
    """
    in_order = widths.tolist()
    return dict(zip(graph.groups, in_order, strict=True))


def _tried(graph: ChannelGraph, samples: int) -> list[np.ndarray]:
    sizes = integers(group.size for group in graph.groups.values())
    generator = np.random.default_rng(0)
    tried = [sizes]
    for step_from in itertools.islice(itertools.cycle(_STEP_FROM), samples):
        widths = _random_widths(sizes, step_from, generator)
        tried.append(widths)
    return tried


def _timed(graph: ChannelGraph, tried: Sequence[np.ndarray], runs: int) -> list[dict[Segment, float]]:
    """Return the milliseconds of each segment, for each network that is tried.

    The original one, which is the first, is timed again among the others, and the median counts: memory is cold at
    first, and all predictions are fractions of its time.
    """
    measured = []
    original = []
    name = type(graph.model).__name__
    with progress(f"Timing {name} at random widths", len(tried)) as work:
        for number, widths in enumerate(tried):
            times = time_segments(graph, _by_name(graph, widths), runs)
            measured.append(times)
            is_turn = number % _ORIGINAL_EVERY == 0
            if is_turn:
                again = time_segments(graph, {}, runs)
                original.append(again)
            work.advance()
    return [_median(original), *measured[1:]]


def _median(several: Sequence[dict[Segment, float]]) -> dict[Segment, float]:
    """Return the median time of each segment."""
    medians = {}
    for segment in several[0]:
        taken = [times[segment] for times in several]
        medians[segment] = statistics.median(taken)
    return medians


def _random_widths(sizes: np.ndarray, step_from: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the width of each group: neighbours must differ, or what comes in is not told from what goes out."""
    fractions = generator.uniform(0.1, 1, len(sizes))
    drawn = (sizes * fractions).round().astype(np.int64)
    step = np.where(sizes >= step_from, _STEP, 1)
    rounded = drawn // step * step
    least = np.minimum(step, sizes)
    return np.maximum(rounded, least)


def fitted(graph: ChannelGraph, segment: Segment, times: np.ndarray, tried: Sequence[np.ndarray]) -> list[Term]:
    """Fit the time of one segment: a constant, the lengths of the axes, rounded up, and the products of these.

    Args:
        graph: The traced model.
        segment: The segment.
        times: (networks,) milliseconds.
        tried: (groups,) widths of each network, the original one first.
    """
    linear = _features(graph, segment.module)
    copied = _unfilled(linear)
    least_error, weighted = float("inf"), []
    for multiple in _MULTIPLES:
        rounded_up = _rounded_up(linear, multiple)
        features = [*rounded_up, *copied][:_MOST_FEATURES]
        error, weights = _fit(graph, features, times, tried)
        if error < least_error:
            least_error = error
            pairs = zip(weights, features, strict=True)
            weighted = list(pairs)
    return [Term(weight, axes, segment.module) for weight, axes in weighted if weight > 0]


def _fit(
    graph: ChannelGraph,
    features: list[tuple[Axis, ...]],
    times: np.ndarray,
    tried: Sequence[np.ndarray],
) -> tuple[float, list[float]]:
    """Fit times by some features.

    Returns:
        The sum of the squares of the relative errors, and the weight of each feature.
    """
    products = Products(features, list(graph.groups))
    values = np.stack([products.of(widths) for widths in tried]).astype(float)  # (networks, features)
    units = values.max(axis=0).clip(min=1)  # so that no weight is far smaller than another
    divisors = times[:, None].clip(min=_SHORTEST)  # relative errors count
    emphasis = np.ones(len(times))
    emphasis[0] = len(times) ** 0.5  # of squares
    relative = values / units / divisors
    weighted = relative * emphasis[:, None]
    found = _non_negative_fit(weighted, emphasis)
    errors = weighted @ found - emphasis
    weights = found / units
    return float(errors @ errors), weights.tolist()


def _rounded_up(features: list[tuple[Axis, ...]], multiple: int) -> list[tuple[Axis, ...]]:
    """Return features whose lengths are rounded up to multiples of a number."""
    rounded = []
    for axes in features:
        rounded_axes = [replace(axis, multiple=multiple) for axis in axes]
        rounded.append(tuple(rounded_axes))
    return rounded


def _unfilled(features: list[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
    """Return the lengths among features, as far as their channels do not fill blocks."""
    unfilled: list[tuple[Axis, ...]] = []
    for axes in features:
        if len(axes) == 1:
            length = replace(axes[0], unfilled=_BLOCK)
            unfilled.append((length,))
    return unfilled


def _features(graph: ChannelGraph, module: str) -> list[tuple[Axis, ...]]:
    """Return the products of axes that the time of a module may grow with; the empty one is the constant."""
    features: list[tuple[Axis, ...]] = [()]
    for term in graph.terms["flops"]:
        if term.module != module:
            continue
        varying = tuple(axis for axis in term.axes if axis.groups)
        features += [(axis,) for axis in varying]
        features.append(varying)
    return list(dict.fromkeys(features))


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
        columns = matrix[:, chosen]
        found = np.linalg.lstsq(columns, target, rcond=None)[0]
        residuals = columns @ found - target
        error = float((residuals**2).sum())
        if error < least_error and found.min() >= 0:
            least_error = error
            best = np.zeros(count)
            best[chosen] = found
    return best


def _choices(count: int) -> list[list[int]]:
    """Return every choice of at least one of some coefficients, the smallest first."""
    sizes = range(1, count + 1)
    return [list(chosen) for size in sizes for chosen in itertools.combinations(range(count), size)]
