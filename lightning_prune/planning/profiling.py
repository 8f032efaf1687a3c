"""Learn from timed runs how long a network takes at any widths of its groups."""

import hashlib
import itertools
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.channel_graph import Axis, ChannelGraph, Term
from lightning_prune.graph.substitution import named_tensors, substituting_tensors
from lightning_prune.planning.cost import Products
from lightning_prune.planning.timing import placed, wait
from lightning_prune.progress import progress

__all__ = ["at_widths", "profile", "time_by_layer"]

_VERSION = 1  # of the files in the cache
Segment = tuple[str, int]  # a module that has tensors or costs, and how often it had run before


def profile(graph: ChannelGraph, samples: int = 32, runs: int = 3) -> None:
    """Measure how the time of a forward pass depends on the widths of the groups.

    The network runs at random widths, on the device and with the example inputs it was traced for. The time between
    the start of one layer and the start of the next is taken to be a constant, plus something for each channel that
    comes in and goes out, plus something for each operation; all of them at least 0, fitted to what was measured. The
    result is kept in the user's cache directory, by device, versions, number of threads and architecture.

    Args:
        graph: The traced model; gets ``terms["latency"]``, in milliseconds.
        samples: Number of networks of random widths, besides the whole one.
        runs: Number of timed runs of each; the fastest counts.

    Example:
        >>> from lightning_prune import trace
        >>> from lightning_prune.planning.cost import CostModel
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> graph = trace(model, torch.zeros(1, 3, 32, 32))
        >>> profile(graph, samples=4, runs=1)
        >>> CostModel(graph, "latency").original > 0
        True
    """
    stored = _cache_file(graph)
    with suppress(OSError, ValueError):  # not there, or damaged: measured again
        graph.terms["latency"] = [_term_from_json(values) for values in json.loads(stored.read_text())]
        return
    groups = list(graph.groups)
    sizes = np.array([graph.groups[name].size for name in groups], dtype=np.int64)
    generator = np.random.default_rng(0)
    widths = [sizes, *(_random_widths(sizes, generator) for _ in range(samples))]
    measured = []
    with progress(f"Timing {type(graph.model).__name__} at random widths", len(widths)) as work:
        for each in widths:
            measured.append(_segments(graph, dict(zip(groups, map(int, each), strict=True)), runs))
            work.advance()
    terms = [
        term
        for segment in measured[0]
        for term in _fitted(graph, segment, np.array([m.get(segment, 0.0) for m in measured]), widths)
    ]
    graph.terms["latency"] = terms
    _store(stored, terms)


def time_by_layer(graph: ChannelGraph, widths: dict[str, int], runs: int = 5) -> dict[str, float]:
    """Measure how long each layer of a network takes at some widths.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent are whole.
        runs: Number of timed runs; the fastest of each layer counts.

    Returns:
        Milliseconds from the start of a layer to the start of the next one, by module name, in the order of the forward
        pass; under ``""`` what comes before the first.
    """
    times: dict[str, float] = {}
    for (name, _), taken in _segments(graph, widths, runs).items():
        times[name] = times.get(name, 0.0) + taken
    return times


@contextmanager
def at_widths(graph: ChannelGraph, widths: dict[str, int], watched: Callable[..., Any] | None = None) -> Iterator[Any]:
    """Give the traced part the shapes it has at some widths for a while; the values are without meaning.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent are whole.
        watched: Given a module and its forward function, returns the function to run in its place.

    Returns:
        A context that yields a function without arguments, which runs the part on the example inputs.
    """
    part = graph.model.get_submodule(graph.module)
    plan = graph.plan({name: torch.arange(width) for name, width in widths.items()})
    shapes = {**graph.shapes, **plan.pruned_shapes()}
    stand_ins = {id(t): _stand_in(t, shapes[name]) for name, t in named_tensors(graph.model).items()}
    args, kwargs = placed(graph.example_inputs, part)
    watched = watched or (lambda module, forward: forward)
    with torch.no_grad(), as_written(), substituting_tensors(part, stand_ins, False, watched):
        yield lambda: part(*args, **kwargs)


def _stand_in(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:  # a forward pass may count in a buffer
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone()
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    channels_last = channels_last and not tensor.is_contiguous()
    made = torch.full(shape, 0.01, device=tensor.device).to(tensor.dtype)  # zeros would be faster on some machines
    return made.contiguous(memory_format=torch.channels_last) if channels_last else made


def _random_widths(sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw the width of each group: neighbours must differ, or what comes in is not told from what goes out."""
    widths = (sizes * generator.uniform(0.1, 1, len(sizes))).round().astype(np.int64)
    step = np.where(sizes >= 64, 8, 1)
    return np.maximum(widths // step * step, np.minimum(step, sizes))


class _Stopwatch:
    """Note when each layer starts."""

    def __init__(self, graph: ChannelGraph, device: torch.device) -> None:
        costly = {term.module for term in graph.terms["flops"]}
        self.names = {
            id(module): name
            for name, module in graph.model.named_modules()
            if name in costly or module._parameters or module._buffers
        }
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[Segment, Any]] = []
        self.entered: Counter[str] = Counter()

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        name = self.names.get(id(module))
        if name is None:
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.mark(name)
            return forward(*args, **kwargs)

        return run

    def mark(self, name: str) -> None:
        if self.on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append(((name, self.entered[name]), now))
        self.entered[name] += 1

    def segments(self) -> dict[Segment, float]:
        """Return the milliseconds from each mark to the next."""
        return {
            segment: start.elapsed_time(stop) if self.on_gpu else 1000 * (stop - start)
            for (segment, start), (_, stop) in itertools.pairwise(self.marks)
        }


def _segments(graph: ChannelGraph, widths: dict[str, int], runs: int) -> dict[Segment, float]:
    """Return the shortest time of each segment, in milliseconds, over some runs after one to warm up."""
    device = next(graph.model.parameters()).device
    watch = _Stopwatch(graph, device)
    found: dict[Segment, float] = {}
    with at_widths(graph, widths, watch.watched) as run:
        run()
        for _ in range(runs):
            watch.marks.clear()
            watch.entered.clear()
            wait(device)
            watch.mark("")
            run()
            watch.mark("")
            wait(device)
            for segment, taken in watch.segments().items():
                found[segment] = min(taken, found.get(segment, taken))
    return found


def _fitted(graph: ChannelGraph, segment: Segment, times: np.ndarray, widths: list[np.ndarray]) -> list[Term]:
    """Fit the time of one segment: a constant, the length of each axis, and the products of axes."""
    axes: dict[tuple[Axis, ...], None] = {(): None}
    for term in graph.terms["flops"]:
        if term.module == segment[0] and any(axis.groups for axis in term.axes):
            varying = tuple(axis for axis in term.axes if axis.groups)
            axes.update({(axis,): None for axis in varying})
            axes[varying] = None
    features = list(axes)[:6]  # of more, some say the same
    products = Products(features, list(graph.groups))
    values = np.stack([products.of(each) for each in widths]).astype(float)
    scale = values[0].clip(min=1)
    weights = _non_negative_fit(values / scale / times[:, None].clip(min=1e-6), np.ones(len(times)))
    return [
        Term(weight / unit, each, segment[0])
        for weight, unit, each in zip(weights.tolist(), scale.tolist(), features, strict=True)
        if weight > 0
    ]


def _non_negative_fit(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solve least squares with coefficients of at least 0, by trying every choice of the few that are not 0."""
    count = matrix.shape[1]
    best, least = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            found = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            error = float(((matrix[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(count), error
                best[list(chosen)] = found
    return best


# -- the cache ---------------------------------------------------------------------------------------------------------


def _cache_file(graph: ChannelGraph) -> Path:
    first = next(graph.model.parameters())
    cpu = [platform.processor(), platform.machine(), os.cpu_count()]
    inputs = [leaf for leaf in torch.utils._pytree.tree_leaves(graph.example_inputs) if isinstance(leaf, Tensor)]
    content = [
        _VERSION, torch.__version__, str(first.dtype), torch.get_num_threads(), graph.module,
        torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else cpu,
        [list(tensor.shape) for tensor in inputs],
        {name: [list(shape), list(tensor.stride())] for (name, shape), tensor in zip(
            graph.shapes.items(), named_tensors(graph.model).values(), strict=True)},
        [[name, type(module).__qualname__] for name, module in graph.model.named_modules()],
        list(graph.groups),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "lightning-prune" / "latency" / f"{digest}.json"


def _store(path: Path, terms: list[Term]) -> None:
    """Write the file in one step, if the cache can be written to; without it the next run measures again."""
    content = [[term.coefficient, [[axis.fixed, axis.groups] for axis in term.axes], term.module] for term in terms]
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _term_from_json(values: list[Any]) -> Term:
    coefficient, axes, module = values
    return Term(
        coefficient, tuple(Axis(fixed, tuple((name, n) for name, n in groups)) for fixed, groups in axes), module
    )
