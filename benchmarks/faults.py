"""Kill runs at every kind of moment, resume them on as many ranks or on others, and tell what comes of it.

A run of each callback is killed (SIGKILL) while it trains, measures, prunes or writes a checkpoint, and resumed from
the last checkpoint that it has left. On as many ranks as before it must end in the bits of an unbroken run: parameters,
buffers and plan of every rank. On other ranks sums are taken in another order; there, in float64 and without batch
normalisation, which sees other batches, the parameters of all ranks must be the same bits, the plan that of the
unbroken run, and the loss at most 1e-9 of it apart. Each step takes the same 16 images on however many ranks (gloo, on
the CPU)::

    python benchmarks/faults.py [--callbacks magnitude taylor] [--moments training] [--worlds "1 to 1" "4 to 2"]

The last rank is killed while training and pruning, the first one while measuring and writing, which it does for all;
then the others, as a launcher does. Goes on where it was stopped; what has failed is run again.
"""

import argparse
import functools
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import battery
import stored
from processes import free_port, run_nodes, start_nodes

from lightning_prune.pruning_plan import plan_in_force

RESULTS = Path(__file__).parent / "results"
MOMENTS = ("training", "measuring", "pruning", "writing")
WORLDS = ("1 to 1", "2 to 2", "1 to 2", "2 to 1", "4 to 2")  # ranks before and after
TOLERANCE = 1e-9  # of the loss, relative, on other ranks
TIMEOUT = 180  # seconds for one run, which takes a few
GRACE = 10  # seconds in which the other ranks may do what they do when one has died
KILLED = -signal.SIGKILL
# Checkpoints are written after every fifth step, and an epoch has six. Prunes are due before epochs 2, 3 and 4.
CHANGES = {"start_epoch": 2}
# What callbacks measure with: it is called, and the rank dies; in the epoch, and at the call, that stand beside it.
MEASURED_BY: dict[str, tuple[str, int, int]] = {
    "default": ("lightning_prune.criteria.score", 3, 1),
    "magnitude": ("lightning_prune.criteria.score", 3, 1),
    "magnitude_refit": ("lightning_prune.callbacks.compensation_step.compensation", 3, 1),
    "magnitude_distilled": ("lightning_prune.callbacks.base.weights_now", 2, 1),
    "magnitude_stopping": ("lightning_prune.callbacks.stopping.snapshot_in_training", 3, 1),
    "taylor": ("lightning_prune.callbacks.taylor.finish", 3, 1),
    "taylor_gate": ("lightning_prune.callbacks.taylor.finish", 3, 1),
    "afie": ("lightning_prune.callbacks.afie.afie", 2, 1),
    "sensitiveness": ("lightning_prune.callbacks.monitoring.classification", 3, 3),
    "rl_joint": ("lightning_prune.callbacks.monitoring.classification", 1, 3),
    "learn_to_prune": ("lightning_prune.callbacks.monitoring.classification", 3, 3),
    "vit": ("lightning_prune.criteria.score", 3, 1),
    "momentum_encoder": ("lightning_prune.criteria.score", 3, 1),
    "blocks": ("lightning_prune.criteria.score", 3, 1),
}


@dataclass(frozen=True)
class Strike:
    """Where a run is killed.

    Attributes:
        place: What is called then; "" for the moment between the backward pass and the step of the optimizer.
        epoch: In which epoch.
        call: At which call of it in that epoch, counted from 1; for training the step in the epoch.
        first_rank: Whether the first rank dies, and not the last one.
    """

    place: str
    epoch: int
    call: int
    first_rank: bool

    @classmethod
    def at(cls, moment: str, callback: str) -> "Strike":
        """Return where a callback's run is killed at a moment."""
        if moment == "training":
            return cls("", epoch=2, call=6, first_rank=False)
        if moment == "measuring":
            return cls(*MEASURED_BY[callback], first_rank=True)
        if moment == "pruning":  # weights and optimizer state are sliced, and nothing else has followed them
            last = 2 if callback == "rl_joint" else 3
            return cls("lightning_prune.callbacks.surgery_step.rewrap", epoch=last, call=1, first_rank=False)
        return cls("fsspec.implementations.local.LocalFileOpener.write", epoch=3, call=1, first_rank=True)


class Killer(L.Callback):
    """Kills the process that it runs in when the moment has come."""

    def __init__(self, strike: Strike) -> None:
        self.strike = strike
        self.trainer: L.Trainer | None = None
        self.calls = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Learn whose epochs count."""
        self.trainer = trainer

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Strike while the network trains."""
        if not self.strike.place and self.is_due():
            self.kill()

    def is_due(self) -> bool:
        """Count a call, and tell whether it is the one."""
        trainer, strike = self.trainer, self.strike
        if trainer is None or trainer.current_epoch != strike.epoch:
            return False
        self.calls += 1
        victim = 0 if strike.first_rank else trainer.world_size - 1
        return trainer.global_rank == victim and self.calls == strike.call

    def kill(self) -> None:
        """End this process without another word."""
        os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def lying_in_wait(self) -> Iterator[None]:
        """Watch the function that is to be called."""
        with ExitStack() as stack:
            if self.strike.place:
                module, _, name = self.strike.place.rpartition(".")
                watch = self._watch_writing if name == "write" else self._watch
                stack.enter_context(patch(self.strike.place, watch(_imported(module, name))))
            yield

    def _watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if self.is_due():
                self.kill()
            return result

        return watched

    def _watch_writing(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def half_written(file: Any, content: bytes) -> Any:
            if self.is_due():
                write(file, content[: len(content) // 2])
                file.flush()
                self.kill()
            return write(file, content)

        return half_written


def _imported(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:  # a method of a class
        module, _, owner = module.rpartition(".")
        return getattr(getattr(importlib.import_module(module), owner), name)


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a callback on some ranks.

    Attributes:
        callback: A row of the battery.
        ranks: Number of ranks.
        bits: Whether it is compared bit by bit, in float32 and with batch normalisation.
        root: Where its checkpoints lie.
    """

    callback: str
    ranks: int
    bits: bool
    root: Path

    def __call__(self, strike: Strike | None = None, timeout: float = TIMEOUT) -> list[dict[str, Any]]:
        """Run to the end, from the last checkpoint if there is one; returns what each rank has come to."""
        run_nodes(self._on_ranks(None), self.root, timeout)
        return [json.loads((self.root / f"end{rank}.json").read_text()) for rank in range(self.ranks)]

    def killed(self, strike: Strike) -> None:
        """Run until it is killed."""
        processes = start_nodes(self._on_ranks(strike), self.root)
        victim = processes[0 if strike.first_rank else -1]
        others = [process.sentinel for process in processes if process is not victim]
        try:
            ended = wait([process.sentinel for process in processes], TIMEOUT)
            victim.join(GRACE)
            deadline = time.monotonic() + GRACE
            while others and time.monotonic() < deadline:
                others = [one for one in others if one not in wait(others, deadline - time.monotonic())]
        finally:
            for process in processes:
                process.kill()
                process.join()
        if not ended or victim.exitcode != KILLED:
            said = "\n".join(path.read_text()[-1000:] for path in sorted(self.root.glob("node*.txt")))
            raise AssertionError(f"ended with {victim.exitcode}, and was not killed: {said}")

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that it has left, in order."""
        return sorted(self.root.glob("checkpoints/*.ckpt"))

    def _on_ranks(self, strike: Strike | None) -> list[Callable[[], None]]:
        port = free_port()
        return [partial(_train, self, rank, port, strike) for rank in range(self.ranks)]


def _train(run: Run, rank: int, port: int, strike: Strike | None) -> None:
    """Train on one rank, and write what has come of it."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    settings: dict[str, Any] = {"precision": "32-true" if run.bits else "64-true"}
    if run.ranks > 1:
        os.environ.update(_as_torchrun_says(rank, run.ranks, port))
        settings |= {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": run.ranks}
    # Lightning itself does not resume to the same bits from a checkpoint of a run that was resumed from one written
    # right after the last batch of an epoch; so after every fifth of six.
    saver = ModelCheckpoint(
        run.root / "checkpoints", filename="{step:02d}", save_top_k=-1, every_n_train_steps=5,
        enable_version_counter=False,
    )  # fmt: skip
    callbacks = [battery.make_callback(run.callback, **CHANGES), saver]
    last = run.checkpoints[-1] if run.checkpoints else None
    with ExitStack() as stack:
        if strike is not None:
            killer = Killer(strike)
            stack.enter_context(killer.lying_in_wait())
            callbacks = [battery.make_callback(run.callback, **CHANGES), saver, killer]
        module = battery.network_of(run.callback)(norm=run.bits)
        if not run.bits:  # Lightning itself would round the weights of a checkpoint before it makes the module double
            module.double()
        battery.train(run.root, *callbacks, module=module, ckpt_path=last, **settings)
    (run.root / f"end{rank}.json").write_text(json.dumps(_end(module)))


def _as_torchrun_says(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "faults",
    }  # fmt: skip


def _end(module: L.LightningModule) -> dict[str, Any]:
    """Say what a module has come to: digests of its parameters and of all of it, its plan, its loss on all images."""
    plan = plan_in_force(module)
    images, labels = battery.images(16 * battery.BATCHES).tensors
    module.eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(module(images.to(module.dtype)), labels)
    return {
        "parameters": _digest(dict(module.named_parameters())),
        "bits": _digest(module.state_dict()),
        "plan": plan.digest if plan is not None else None,
        "loss": float(loss),
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# -- one cell ----------------------------------------------------------------------------------------------------------


@functools.cache
def unbroken(callback: str, ranks: int, bits: bool) -> list[dict[str, Any]]:
    """Return what each rank of a run comes to that nothing happens to."""
    with tempfile.TemporaryDirectory() as root:
        return Run(callback, ranks, bits, Path(root))()


def survive(callback: str, moment: str, world: str) -> dict[str, Any]:
    """Kill a run, resume it, and return how it compares with one that nothing has happened to.

    Args:
        callback: A row of the battery.
        moment: One of `MOMENTS`.
        world: One of `WORLDS`.

    Returns:
        The checkpoint that the run went on from; whether all bits of all ranks, the parameters of all ranks among each
        other, and the plans are ``equal``; how far the loss is ``apart``, relative.
    """
    before, after = map(int, world.split(" to "))
    bits = before == after
    expected = unbroken(callback, after, bits)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first, second = (Run(callback, ranks, bits, root) for ranks in (before, after))
        first.killed(Strike.at(moment, callback))
        for path in first.checkpoints:
            torch.load(path, weights_only=True)  # none is half-written
        last = first.checkpoints[-1].stem
        found = second()
    return {
        "from": last,
        "bits": found == expected if bits else None,
        "ranks": len({rank["parameters"] for rank in found}) == 1,
        "plan": {rank["plan"] for rank in found} == {expected[0]["plan"]},
        "apart": abs(found[0]["loss"] - expected[0]["loss"]) / expected[0]["loss"],
        "loss": found[0]["loss"],
    }


def is_right(record: dict[str, Any]) -> bool:
    """Tell whether a run that was killed and resumed has come to what it must come to."""
    if "failed" in record or not (record["ranks"] and record["plan"]):
        return False
    return record["apart"] <= TOLERANCE if record["bits"] is None else record["bits"]


def cell(callback: str, moment: str, world: str) -> dict[str, Any]:
    """Return the record of one cell, also if something fails."""
    began = time.monotonic()
    try:
        record = survive(callback, moment, world)
    except Exception as error:
        record = {"failed": f"{type(error).__name__}: {str(error)[-1500:]}"}
    return {**record, "seconds": round(time.monotonic() - began, 1)}


# -- the table ---------------------------------------------------------------------------------------------------------


def rendered(results: dict[str, Any]) -> str:
    """Return the page: a row for each callback and moment, a column for each pair of worlds."""
    cells = {tuple(key.split(" | ")): record for key, record in results.items()}
    wrong = sum(not is_right(record) for record in results.values())
    hardware = ", ".join(sorted({record["made"]["hardware"] for record in results.values()}))
    lines = [
        "# Faults", "",
        "Written by `benchmarks/faults.py`, which says what is done and what must come of it.", "",
        f"{len(results)} runs killed and resumed, {wrong} ended wrong. {hardware}.", "",
        "`bits`: equal to the unbroken run in every bit, on every rank. Elsewhere the ranks agree in every bit, the",
        "plan is the same, and the number is how far the loss is from that of the unbroken run, relative.", "",
        f"| callback | killed while | {' | '.join(WORLDS)} |", "| --- " * (2 + len(WORLDS)) + "|",
    ]  # fmt: skip
    for callback in battery.CALLBACKS:
        for moment in MOMENTS:
            row = [_shown(cells.get((callback, moment, world))) for world in WORLDS]
            lines.append(f"| {callback} | {moment} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _shown(record: dict[str, Any] | None) -> str:
    if record is None:
        return "not run"
    if "failed" in record:
        return f"FAILED: {record['failed'].partition(':')[0]}"
    text = "bits" if record["bits"] else f"{record['apart']:.0e}"
    return text if is_right(record) else f"WRONG: {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", nargs="+", choices=battery.CALLBACKS, default=list(battery.CALLBACKS))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.json")
    parser.add_argument("--table", type=Path, default=RESULTS / "faults.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    made, results = stored.made_with(settings), stored.load(settings.results)
    for callback in settings.callbacks:
        for moment in settings.moments:
            for world in settings.worlds:
                key = f"{callback} | {moment} | {world}"
                if key not in results or not is_right(results[key]):
                    results[key] = {**cell(callback, moment, world), "made": made}
                    stored.save(settings.results, results)
                    print(f"{key}: {_shown(results[key])}; {results[key]['seconds']} s", flush=True)
    with stored.whole(settings.table) as partial_table:
        partial_table.write_text(rendered(results))
    wrong = [key for key, record in results.items() if not is_right(record)]
    sys.exit(f"{len(wrong)} of {len(results)} are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
