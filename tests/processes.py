"""Processes for tests, started from one that has imported everything already."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest


def warm() -> ForkServerContext:
    """Return what starts processes as forks of one that has imported torch, Lightning and the battery, and no more.

    A fork of the process that runs the tests would inherit what they have done, threads among it; a fresh interpreter
    takes seconds to import.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["battery"])
    with pytest.MonkeyPatch.context() as patch:  # where it finds what to import
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def start_nodes(nodes: list[Callable[[], None]], root: Path) -> list[ForkServerProcess]:
    """Start a function on each of some nodes that are all this machine; what they say is written to files."""
    context = warm()
    said = [root / f"node{number}.txt" for number in range(len(nodes))]
    processes = [context.Process(target=_node, args=pair) for pair in zip(nodes, said, strict=True)]
    for process in processes:
        process.start()
    return processes


def run_nodes(nodes: list[Callable[[], None]], root: Path, timeout: float = 600) -> None:
    """Run a function on each of some nodes that are all this machine, and fail with what they said."""
    processes = start_nodes(nodes, root)
    try:
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            process.kill()
    failed = [process.exitcode for process in processes] != [0] * len(processes)
    assert not failed, "\n".join(path.read_text()[-3000:] for path in sorted(root.glob("node*.txt")))


def _node(run: Callable[[], None], said: Path) -> None:
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        run()


def torchrun(run: Callable[..., None], root: Path, nodes: int, *names: str) -> None:
    """Run a function on two ranks as torchrun does, on one node or on two."""
    port = free_port()
    run_nodes([partial(_torchrun_node, run, root, nodes, number, port, names) for number in range(nodes)], root)


def _torchrun_node(
    run: Callable[..., None], root: Path, nodes: int, number: int, port: int, names: Sequence[str]
) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What torchrun makes of its arguments; it would start interpreters, which take seconds to import.
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=2 // nodes, run_id="tests", rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs={"rank": number, "timeout": 600}, max_restarts=0,
        start_method="fork",
    )  # fmt: skip
    elastic_launch(config, run)(root, nodes, 2 // nodes, names)


def srun(run: Callable[..., None], root: Path, *names: str) -> None:
    """Run a function on two nodes as SLURM's launcher tells them of each other."""
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2", "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    run_nodes([partial(_srun_task, run, root, task, names) for task in tasks], root)


def _srun_task(run: Callable[..., None], root: Path, task: dict[str, str], names: Sequence[str]) -> None:
    os.environ.update(task)
    run(root, 2, 1, names)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def of_both_ranks(root: Path, name: str) -> list[dict[str, Any]]:
    """Return what each of two ranks has written about one of its runs, or fail with what they said instead."""
    paths = [root / f"{name}.rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), (root / "error.txt").read_text()
    return [json.loads(path.read_text()) for path in paths]
