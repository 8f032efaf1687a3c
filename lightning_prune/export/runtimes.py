"""Runtimes that a network can be timed in: torch itself, and those that run what is exported from it."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.export.entry import export
from lightning_prune.export.inputs import flat_tensors
from lightning_prune.export.onnx import open_session
from lightning_prune.graph.entry import as_call
from lightning_prune.planning.timing import placed

__all__ = ["RUNTIMES", "Ready", "ready_in"]

Ready = Callable[[Any], Callable[[], Any]]
"""Given example inputs, returns what runs a network on them, with all that can be done before already done."""

_TOLERANCE = 1e-3  # of outputs, which other kernels round otherwise


def ready_in(runtime: str, model: nn.Module, example_inputs: Any, folder: Path) -> Ready:
    """Make a network ready to run in a runtime, on as many CPU threads as torch has.

    Args:
        runtime: A name in `RUNTIMES`.
        model: The network, in evaluation mode.
        example_inputs: What its ``forward`` takes, as for `lightning_prune.trace`.
        folder: Where a file may be written.

    Raises:
        ValueError: If there is no such runtime, or the network cannot be exported for it.
        ImportError: If the runtime is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}; got {runtime!r}.")
    return RUNTIMES[runtime](model, example_inputs, folder)


def _in_torch(model: nn.Module, example_inputs: Any, folder: Path) -> Ready:
    def ready(inputs: Any) -> Callable[[], Any]:
        args, kwargs = placed(inputs, model)
        return partial(model.eval(), *args, **kwargs)

    return ready


def _exported(model: nn.Module, example_inputs: Any, folder: Path) -> Path:
    path = folder / "network.onnx"
    export(model, example_inputs, path, _TOLERANCE)
    return path


def _arrays(inputs: Any) -> list[Any]:
    return [tensor.numpy() for tensor in flat_tensors(as_call(inputs))]


def _in_onnxruntime(model: nn.Module, example_inputs: Any, folder: Path) -> Ready:
    session = open_session(_exported(model, example_inputs, folder))
    names = [entry.name for entry in session.get_inputs()]

    def ready(inputs: Any) -> Callable[[], Any]:
        feed = dict(zip(names, _arrays(inputs), strict=True))
        return partial(session.run, None, feed)

    return ready


def _in_openvino(model: nn.Module, example_inputs: Any, folder: Path) -> Ready:
    if find_spec("openvino") is None:
        raise ImportError('OpenVINO is not installed: pip install "lightning-prune[openvino]".')
    import openvino

    core = openvino.Core()
    network = core.read_model(_exported(model, example_inputs, folder))
    compiled = core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    request = compiled.create_infer_request()

    def ready(inputs: Any) -> Callable[[], Any]:
        return partial(request.infer, _arrays(inputs))

    return ready


RUNTIMES: dict[str, Callable[[nn.Module, Any, Path], Ready]] = {
    "torch": _in_torch,
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
}
"""By name: makes a network ready to run, given example inputs and a folder for a file."""
