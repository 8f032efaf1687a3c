"""One project with some callbacks: a trial run, training, its files in another process, and going on from them.

`run.py` starts this in the environment of the project, once for what writes files and once for what reads them:

    python trial.py CASE WORK try,fit default taylor        # fast_dev_run=2; a run of three epochs
    python trial.py CASE WORK load,resume default taylor

Each step writes what it found to ``WORK/<callback>/<step>.json``.
"""

import importlib
import itertools
import json
import logging
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from case import Case
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, TaylorRankCallback
from lightning_prune.pruning_plan import plan_in_force

EPOCHS = 3  # a prune before the second one
LIGHTNINGS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")  # any of them may speak

CALLBACKS = {
    "default": lambda: PruningCallback(),
    "taylor": lambda: TaylorRankCallback(),
    "magnitude": lambda: PruningCallback(criterion="magnitude", compensate="none"),
}


class Watch(L.Callback):
    """Note which parameters an epoch changes, the first one and the last one, after the prune, and the last weights."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.moved: dict[int, set[str]] = {}
        self.weights: dict[str, Tensor] = {}  # at the end; a project may load its best ones then, to test them

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.before = {name: tensor.detach().clone() for name, tensor in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        now = dict(pl_module.named_parameters())
        moved = {name for name, tensor in now.items() if not torch.equal(tensor, self.before[name])}
        self.moved[trainer.current_epoch] = moved

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    @property
    def untrained(self) -> list[str]:
        """The parameters that were trained before the prune, and not after."""
        return sorted(self.moved[0] - self.moved[max(self.moved)])


class Told(logging.Filter):
    """Keep what is said, and let it pass: handlers are taken off by some projects."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines += record.getMessage().splitlines()
        return True


def case_named(name: str, work: Path) -> Case:
    """Make a case, named by its script and function; what is synthesised lies in a folder that all callbacks share."""
    script, _, function = name.partition(":")
    made: Case = getattr(importlib.import_module(script), function)(work.parent / "data")
    return made


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trial(case: Case, callback: Any, work: Path, told: Told) -> dict[str, Any]:
    """Run a few batches, a prune among them."""
    case.fit(work / "trial", [callback], fast_dev_run=2)
    return {"outcome": "runs"}


def fit(case: Case, callback: Any, work: Path, told: Told) -> dict[str, Any]:
    """Train through a prune, and note what became of the network and of the files."""
    watch = Watch()
    callbacks = [*case.callbacks(work), callback, watch]
    module, trainer = case.fit(work, callbacks, max_epochs=EPOCHS)
    saver = trainer.checkpoint_callback
    files = {"best": saver.best_model_path, "last": saver.last_model_path, "printed": callback.result_path}
    torch.save(watch.weights, work / "weights.pt")
    prunes = callback.history.prunes
    return {
        "outcome": "runs",
        "help": list(case.help),
        "asked": callback.keep,
        "achieved": prunes[-1].budget["achieved"],
        "compensated": bool(prunes[-1].compensation),
        "parameters": [size(case.module()), size(module)],
        "untrained": watch.untrained,
        "lines": lines_in(told.lines),
        "files": {name: path for name, path in files.items() if path},  # not all projects keep the last one
    }


def lines_in(told: list[str]) -> list[str]:
    """Return the lines that load the result, as they were printed at the end of a run."""
    start = told.index("load it:") + 1
    end = next(place for place in range(start, len(told)) if told[place].startswith("model = "))
    return told[start : end + 1]


def load(case: Case, callback: Any, work: Path, told: Told) -> dict[str, Any]:
    """Load all files that a run has named."""
    found = json.loads((work / "fit.json").read_text())
    weights = torch.load(work / "weights.pt")
    loaded = {}
    for name, path in found["files"].items():
        module = lp.load_pruned(type(case.module()), path, **case.given())
        shapes = {key: tensor.shape for key, tensor in weights.items()}
        held = {key: tensor.shape for key, tensor in module.state_dict().items()}
        loaded[name] = "pruned" if shapes == held and plan_in_force(module) is not None else "another network"
        if name == "printed" and not _same(module, weights):
            loaded[name] = "other weights"
    # Which lines these are does not depend on the callback, and they take a process.
    pasted = _pasted(found["lines"], work) if work.name == "default" else "-"
    return {"loaded": loaded, "pasted": pasted, "evaluated": case.evaluate(work / "evaluated", found["files"]["best"])}


def _pasted(lines: list[str], work: Path) -> str:
    """Run the lines that a run has printed in a process that knows nothing else, or say what they ask for."""
    asked = [line for line in lines if line.startswith("# give")]
    if asked:
        return "asks for " + asked[0].rpartition(": ")[2]
    script = work / "pasted.py"
    count = "print(sum(parameter.numel() for parameter in model.parameters()))"
    script.write_text("\n".join([*lines, count, ""]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def _same(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Tell whether a module has some weights, bit for bit; what is no number is one everywhere."""
    pairs = ((tensor, weights[name]) for name, tensor in module.state_dict().items())
    return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


def resume(case: Case, callback: Any, work: Path, told: Told) -> dict[str, Any]:
    """Go on from the last file for an epoch."""
    found = json.loads((work / "fit.json").read_text())
    path = found["files"].get("last", found["files"]["printed"])
    callbacks = [*case.callbacks(work / "resumed"), callback]
    module, trainer = case.fit(work / "resumed", callbacks, ckpt_path=path, max_epochs=EPOCHS + 1)
    whole = size(module) == found["parameters"][1] and trainer.current_epoch == EPOCHS + 1
    return {"resumed": "yes" if whole else f"to {size(module)} parameters in epoch {trainer.current_epoch}"}


STEPS = {"try": trial, "fit": fit, "load": load, "resume": resume}


def outcome_of(raised: Exception, callback: Any) -> str:
    """Say whether a run was refused before its first step, or failed."""
    said = f"{type(raised).__name__}: {raised}"
    trained = isinstance(callback, PruningCallback) and callback.steps_done > 0
    in_setup = any(frame.name in ("setup", "on_train_start") for frame in traceback.extract_tb(raised.__traceback__))
    return f"refused: {said}" if isinstance(raised, ValueError) and in_setup and not trained else f"fails: {said}"


def main() -> None:
    name, folder, steps, *rows = sys.argv[1:]
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    told = Told()
    logging.captureWarnings(True)
    for speaker in (*(f"{package}.utilities.rank_zero" for package in LIGHTNINGS), "py.warnings"):
        logging.getLogger(speaker).addFilter(told)
    for row, step in itertools.product(rows, steps.split(",")):
        work = Path(folder) / row
        work.mkdir(parents=True, exist_ok=True)
        told.lines = []
        found = outcome(name, row, step, work, told)
        (work / f"{step}.json").write_text(json.dumps(found, indent=1))


def outcome(name: str, row: str, step: str, work: Path, told: Told) -> dict[str, Any]:
    """Take a step with a callback of its own, and return what was found, or how it failed, and what was said."""
    start = time.perf_counter()
    callback = CALLBACKS[row]()
    try:
        found = STEPS[step](case_named(name, work), callback, work, told)
    except Exception as raised:
        traceback.print_exc()
        found = {"outcome": outcome_of(raised, callback)}
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["told"] = told.lines
    return found


if __name__ == "__main__":
    main()
