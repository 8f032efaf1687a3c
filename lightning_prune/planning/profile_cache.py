"""Cache of profiles: what was measured of a network is read again on the same machine."""

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from lightning_prune.files import written_whole
from lightning_prune.graph.channel_graph import Axis, ChannelGraph, Term
from lightning_prune.graph.entry import as_call
from lightning_prune.graph.nested import nested_tensors

__all__ = ["load_terms", "store_terms"]

_VERSION = 3  # of the files


def load_terms(graph: ChannelGraph) -> list[Term] | None:
    """Return the terms that were stored for a network, or None if there are none or the file is damaged."""
    try:
        content = json.loads(_file_of(graph).read_text())
        return [_term_from_json(values) for values in content]
    except (OSError, ValueError):
        return None


def store_terms(graph: ChannelGraph, terms: list[Term]) -> None:
    """Store the terms of a network, if the cache can be written to; without it the next run measures again."""
    content = [_term_to_json(term) for term in terms]
    path = _file_of(graph)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content))


def _file_of(graph: ChannelGraph) -> Path:
    """Return the file of a network: its name is made of all that its time depends on."""
    key = json.dumps(_key(graph))
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lightning-prune" / "latency" / f"{digest}.json"


def _key(graph: ChannelGraph) -> list[Any]:
    """Return versions, machine, inputs and architecture as plain values."""
    first = next(graph.model.parameters())
    inputs = list(nested_tensors(as_call(graph.example_inputs)))
    tensors = graph.tensors()
    layouts = {
        name: [list(shape), list(tensor.stride())]
        for (name, shape), tensor in zip(graph.shapes.items(), tensors.values(), strict=True)
    }
    return [
        _VERSION,
        torch.__version__,
        str(first.dtype),
        torch.get_num_threads(),
        graph.module,
        _machine(first.device),
        [list(tensor.shape) for tensor in inputs],
        layouts,
        [[name, type(module).__qualname__] for name, module in graph.model.named_modules()],
        list(graph.groups),
    ]


def _machine(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return [platform.processor(), platform.machine(), os.cpu_count()]


def _term_to_json(term: Term) -> list[Any]:
    axes = [astuple(axis) for axis in term.axes]
    return [term.coefficient, axes, term.module]


def _term_from_json(values: list[Any]) -> Term:
    coefficient, axes, module = values
    return Term(coefficient, tuple(_axis_from_json(axis) for axis in axes), module)


def _axis_from_json(values: list[Any]) -> Axis:
    fixed, groups, *blocks = values
    pairs = map(tuple, groups)
    return Axis(fixed, tuple(pairs), *blocks)
