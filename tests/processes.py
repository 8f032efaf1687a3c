"""Processes for tests: started from one that has imported everything already, or by torchrun."""

import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that finds the modules of the tests."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **changes}


def warm() -> ForkServerContext:
    """Return what starts processes as forks of one that has imported torch, Lightning and the battery, and no more.

    A fork of the process that runs the tests would inherit what they have done, threads among it; a fresh interpreter
    takes seconds to import.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["battery"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def run_nodes(commands: list[list[str]], environments: list[dict[str, str]], timeout: float) -> None:
    """Run a Python program on each of some nodes that are all this machine, and fail with what they said."""
    nodes = [
        subprocess.Popen(
            [sys.executable, *command], env=environment(GLOO_SOCKET_IFNAME="lo", **changes), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command, changes in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        said = [node.communicate(timeout=timeout)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(text[-3000:] for text in said)


def of_both_ranks(root: Path, name: str) -> list[dict[str, Any]]:
    """Return what each of two ranks has written about one of its runs, or fail with what they said instead."""
    paths = [root / f"{name}.rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), (root / "error.txt").read_text()
    return [json.loads(path.read_text()) for path in paths]
