"""Public projects, pinned by version, that train as their documentation has them, with one callback beside.

    python benchmarks/projects/run.py torchgeo            # or another of PROJECTS, or `all`

Each project gets an environment of its own, made once below ``--work``, into which it and this package are installed
from the registry of packages. PyTorch is several gigabytes: with ``--torch-from PYTHON`` an environment uses that
interpreter's packages beside its own and installs only what is missing there. The template is no package; it is checked
out at a commit from ``--template``, its address or a copy of it. What the projects read (pictures, volumes, series) is
synthesised in their formats; published weights are not fetched.

Each case is tried with each of three callbacks, nothing else changed: ``PruningCallback()``,
``TaylorRankCallback()`` and ``PruningCallback(criterion="magnitude", compensate="none")``: a trial run of two batches
and a run of three epochs in one process, the files that are left and going on from them in another (`trial.py`). A
record per case and callback is added to ``benchmarks/results/projects.json`` as it comes; those that are there are left
alone, and ``projects.md`` is made of them. No part of CI.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import stored  # noqa: E402 - lies one folder up

RESULTS = REPOSITORY / "benchmarks" / "results" / "projects.json"
TEMPLATE = "https://github.com/ashleve/lightning-hydra-template"
TEMPLATE_COMMIT = "bddbc24b82ab6ccfa6243e815a49dc5bfe8d4144"
PINNED = ["torch==2.14.1", "torchvision==0.29.1", "lightning==2.6.6", "pytorch-lightning==2.6.6"]

# What is installed for each project, and its cases: script and function.
PROJECTS: dict[str, tuple[list[str], list[str]]] = {
    "torchgeo": (
        ["torchgeo==0.8.1", "pycocotools"],
        ["geo_tasks:classification", "geo_tasks:segmentation", "geo_tasks:faster_rcnn", "geo_tasks:retinanet"],
    ),
    "lightly": (["lightly==1.6.0"], ["lightly_modules:simclr", "lightly_modules:byol", "lightly_modules:dino"]),
    "segmentation_models_pytorch": (["segmentation-models-pytorch==0.6.0"], ["smp_module:pets"]),
    "pytorch-forecasting": (["pytorch-forecasting==1.8.0"], ["forecasting:nbeats", "forecasting:tft"]),
    "monai": (["monai==1.6.1"], ["monai_unet:spleen"]),
    "anomalib": (["anomalib==2.7.0"], ["anomalib_models:stfpm"]),
    "ultralytics": (["ultralytics==8.4.190"], ["yolo_module:yolov8"]),
    "lightning-hydra-template": (
        ["hydra-core==1.3.8", "hydra-colorlog==1.2.0", "hydra-optuna-sweeper==1.2.0", "rootutils", "rich"],
        ["hydra_template:mnist"],
    ),
}
CALLBACKS = ["default", "taylor", "magnitude"]
STEPS = [["try", "fit"], ["load", "resume"]]  # those of a process
LIMIT = 3600  # seconds for a process


# -- environments ------------------------------------------------------------------------------------------------------


def environment(project: str, settings: argparse.Namespace) -> Path:
    """Return the interpreter of the environment of a project; it is made if there is none."""
    folder = settings.work / "environments" / project
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--clear", str(folder)], check=True)
    if settings.torch_from:
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        other = _output([settings.torch_from, "-c", ask])
        own = Path(_output([str(python), "-c", ask]))
        (own / "base.pth").write_text(other + "\n")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(PINNED) + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*install, *PINNED, *PROJECTS[project][0], "--editable", str(REPOSITORY)], check=True)
    done.touch()
    return python


def template(settings: argparse.Namespace) -> Path:
    """Return the folder of the template, checked out at its commit."""
    folder: Path = settings.work / "template"
    if not (folder / ".checked_out").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", settings.template, str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", TEMPLATE_COMMIT], check=True)
        (folder / ".checked_out").touch()
    return folder


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# -- trials ------------------------------------------------------------------------------------------------------------


def tried(case: str, callbacks: list[str], python: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Put a case with each of some callbacks through all steps that it comes to, and return what was found."""
    work: Path = settings.work / case.replace(":", "-")
    for callback in callbacks:
        shutil.rmtree(work / callback, ignore_errors=True)
        (work / callback).mkdir(parents=True)
    records: dict[str, Any] = {callback: {} for callback in callbacks}
    for steps in STEPS:
        going_on = [row for row, record in records.items() if record.get("fit", {}).get("outcome", "runs") == "runs"]
        if going_on:
            log = _run_trial(python, case, work, steps, going_on, settings)
            for callback, step in itertools.product(going_on, steps):
                records[callback][step] = _found(work / callback / f"{step}.json", log, settings)
    return records


def _run_trial(
    python: Path, case: str, work: Path, steps: list[str], callbacks: list[str], settings: argparse.Namespace
) -> Path:
    """Take some steps in a process of their own, and return the file of what it says."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    if case.startswith("hydra_template"):
        known["TEMPLATE"] = str(template(settings).absolute())
        # It tests from files that hold its network and optimizer as objects, which PyTorch since 2.6 does not read
        # unless it is told to, with or without a prune.
        known["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    command = [str(python), str(HERE / "trial.py"), case, str(work.absolute()), ",".join(steps), *callbacks]
    log = work / f"{steps[-1]}.log"
    with log.open("w") as written:
        try:
            subprocess.run(command, stdout=written, stderr=written, env=known, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            written.write(f"\ntakes more than {LIMIT} s")
    return log


def _found(path: Path, log: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Return what a step has written, or how its process ended before."""
    if not path.exists():
        last = (log.read_text().strip().splitlines() or ["says nothing"])[-1]
        return {"outcome": f"fails: {last}", "seconds": 0.0}
    text = path.read_text().replace(f"{settings.work.absolute()}/", "")  # where that is, is nobody else's concern
    found: dict[str, Any] = json.loads(text)
    return {name: value for name, value in found.items() if name not in ("told", "lines")}


# -- the page ----------------------------------------------------------------------------------------------------------

HEAD = [
    "| project | callback | outcome | help | asked | kept | parameters | compensated | untrained | trial run | files "
    "| pasted line | resumed | seconds |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def page(records: dict[str, Any]) -> str:
    """Return a table of all trials."""
    lines = ["# Public projects", "", *HEAD]
    lines += [_row(key, record) for key, record in records.items()]
    return "\n".join(lines) + "\n"


def _row(key: str, record: dict[str, Any]) -> str:
    project, case, callback = key.split(" | ")
    fit, load, resume = (record.get(step, {}) for step in ("fit", "load", "resume"))
    name = f"{project} {case.partition(':')[2]}"
    seconds = sum(found["seconds"] for found in record.values())
    trial_run = record["try"]["outcome"]
    agrees = trial_run if trial_run == "runs" else trial_run.partition(":")[0]
    if fit["outcome"] != "runs":
        told = " ".join(fit["outcome"].split())
        return f"| {name} | {callback} | {told} | - | - | - | - | - | - | {agrees} | - | - | - | {seconds:.0f} |"
    before, after = fit["parameters"]
    files = load.get("loaded", {"all": load.get("outcome", "not read")})
    kinds = set(files.values())
    held = f"{', '.join(files)}: {kinds.pop()}" if len(kinds) == 1 else str(files)
    pasted = load.get("pasted", "-")
    pasted = "pruned" if pasted == str(after) else pasted
    told = "; ".join(filter(None, [held, load.get("evaluated", "")]))
    cells = [
        name, callback, "runs", str(len(fit["help"])), f"{fit['asked']:.2f}", f"{fit['achieved']:.3f}",
        f"{before:,} -> {after:,}", "yes" if fit["compensated"] else "no", ", ".join(fit["untrained"]) or "none",
        agrees, told, pasted, resume.get("resumed") or resume.get("outcome", "-"), f"{seconds:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="+", choices=[*PROJECTS, "all"])
    parser.add_argument("--callbacks", nargs="+", choices=CALLBACKS, default=CALLBACKS)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "projects", help="environments, data, runs")
    parser.add_argument("--torch-from", help="an interpreter whose packages are used and not installed again")
    parser.add_argument("--template", default=TEMPLATE, help="address or copy of lightning-hydra-template")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    names = list(PROJECTS) if "all" in settings.projects else settings.projects
    results = stored.load(settings.results)
    for project in names:
        for case in PROJECTS[project][1]:
            missing = [row for row in settings.callbacks if f"{project} | {case} | {row}" not in results]
            if missing:
                for row, record in tried(case, missing, environment(project, settings), settings).items():
                    results[f"{project} | {case} | {row}"] = record
                    print(_row(f"{project} | {case} | {row}", record), flush=True)
                stored.save(settings.results, results)
    stored.save(settings.results, results)
    stored.save_page(settings.results, page(results))


if __name__ == "__main__":
    main()
