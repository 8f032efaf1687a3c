"""Latency tables: how long each layer of a packed network takes in ONNX Runtime at the widths of the pack.

What is imported here is there without Lightning, and the code of the network is not needed.
"""

import json
import os
import platform
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.planning.tables import VERSION
from lightning_prune.progress import progress

__all__ = ["measure_pack"]

_FILL = 0.01
_WARM_UP = 3


def measure_pack(path: str | Path, threads: int = 1, runs: int = 20) -> dict[str, Any]:
    """Time the networks of a pack in ONNX Runtime on this machine.

    Args:
        path: What `write_pack` has written.
        threads: Number of CPU threads.
        runs: Number of timed runs of each network; the fastest of each layer counts.

    Returns:
        The table, as plain values.

    Raises:
        ValueError: If the file is no pack.
        ImportError: If ONNX Runtime is missing.
    """
    try:
        import onnxruntime
    except ImportError as raised:
        raise ImportError("A latency table needs ONNX Runtime: pip install onnx onnxruntime.") from raised
    try:
        pack = zipfile.ZipFile(path)
        content = json.loads(pack.read("pack.json"))
    except (zipfile.BadZipFile, KeyError, ValueError) as raised:
        raise ValueError(f"{str(path)!r} is no pack: write one with `lightning-prune profile CKPT --pack`.") from raised
    times = []
    with pack, progress("Timing in ONNX Runtime", len(content["samples"])) as work:
        for number in range(len(content["samples"])):
            network = _with_values(pack.read(f"{number}.onnx"))
            times.append(_layer_times(network, content, threads, runs))
            work.advance()
    return {
        "version": VERSION,
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "machine": [platform.node(), platform.machine(), platform.processor(), os.cpu_count(), f"{threads} threads"],
        "groups": content["groups"],
        "samples": content["samples"],
        "times": times,
    }


def _with_values(content: bytes) -> bytes:
    """Return a network with numbers in its weights, which zeros would make faster on some machines."""
    import onnx

    network = onnx.load_from_string(content)
    for tensor in network.graph.initializer:
        count = int(np.prod(tensor.dims))
        if tensor.data_type == onnx.TensorProto.FLOAT and count and not (tensor.raw_data or tensor.float_data):
            tensor.raw_data = np.full(count, _FILL, dtype=np.float32).tobytes()
    return bytes(network.SerializeToString())


def _layer_times(network: bytes, content: dict[str, Any], threads: int, runs: int) -> dict[str, float]:
    """Return the milliseconds of each module; what cannot be told apart is under the module before it."""
    total = _fastest(network, content, threads, runs)
    by_node = _node_times(network, content, threads, runs)
    times: dict[str, float] = {}
    module = ""
    for event, taken in by_node.items():
        module = _module_of(event, content["modules"], module)
        times[module] = times.get(module, 0.0) + taken
    scale = total / max(sum(times.values()), 1e-9)  # what the profiler adds, and what runs between nodes
    return {module: taken * scale for module, taken in times.items()}


def _module_of(event: str, modules: dict[str, str], last: str) -> str:
    """Return the module of what was run, or the last one; what is fused is named after one of the nodes or values."""
    name = event.removeprefix("fused ")
    known = [each for each in modules if each and name.startswith(f"{each}_")]
    return modules[max(known, key=len)] if known else last


def _session(network: bytes, threads: int, profile: str = "") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def _feed(session: Any, content: dict[str, Any]) -> dict[str, Any]:
    feed = {}
    for entry, (shape, kind) in zip(session.get_inputs(), content["inputs"], strict=True):
        feed[entry.name] = np.ones(shape, dtype=kind)
    return feed


def _fastest(network: bytes, content: dict[str, Any], threads: int, runs: int) -> float:
    """Return the milliseconds of the fastest run, without a profiler."""
    session = _session(network, threads)
    feed = _feed(session, content)
    taken = []
    for _ in range(_WARM_UP + runs):
        started = time.perf_counter()
        session.run(None, feed)
        taken.append(1000 * (time.perf_counter() - started))
    return min(taken[_WARM_UP:])


def _node_times(network: bytes, content: dict[str, Any], threads: int, runs: int) -> dict[str, float]:
    """Return the fastest milliseconds of each node that is run, by its name, in their order."""
    with tempfile.TemporaryDirectory(prefix="lightning-prune-") as folder:
        session = _session(network, threads, str(Path(folder, "profile")))
        feed = _feed(session, content)
        for _ in range(_WARM_UP + runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[str, float] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            taken = event["dur"] / 1000
            fastest[name] = min(taken, fastest.get(name, taken))
    return fastest
