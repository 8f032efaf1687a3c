"""Results that a benchmark keeps in a JSON file: added to as they come, each with what it was made with and on.

A script loads the file, adds what is missing of it, and saves it after each addition, so that a run that is stopped
goes on where it was. A record that is added holds, under ``made``, what `made_with` returns.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Options that say where things lie or what is to be run, and not how.
_NOT_SETTINGS = {
    "root", "work", "results", "weights",
    "networks", "rows", "methods", "seeds", "table", "batch", "env", "agents", "sac_steps", "ppo_steps",
    "callbacks", "moments", "worlds", "plans", "seed",
}  # fmt: skip


def load(path: str | Path) -> Any:
    """Return what a file holds; an empty dictionary if it is not there."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: str | Path, content: Any) -> None:
    """Write a file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def save_page(path: Path, text: str) -> None:
    """Write the page that shows a file of results, beside it, whole or not at all."""
    with whole(path.with_suffix(".md")) as partial:
        partial.write_text(text)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Make a file appear only when it is complete: a context that yields where to write it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def kept(path: str | Path, make: Callable[[], Any]) -> Any:
    """Return the tensors that a file holds; they are made, and kept there, if there is none."""
    if not Path(path).exists():
        content = make()
        with whole(path) as partial:
            torch.save(content, partial)
    return torch.load(path, weights_only=True)


def complete(path: str | Path, results: dict[str, Any], runs: Mapping[str, Callable[[], Any]], made: Any) -> None:
    """Add the records that are missing, each saved when it is there; end the script if one has other settings.

    Args:
        path: The file.
        results: What it holds, by ``setting | row | seed``.
        runs: What makes each record, by the same keys, in the order in which they are run.
        made: What `made_with` returns.
    """
    for key, run in runs.items():
        if key not in results:
            results[key] = {**run(), "made": made}
            save(path, results)
            print(f"{key}: {results[key]['accuracy']:.4f}; seconds {results[key]['seconds']}", flush=True)
        check(results[key], made)


def complete_page(
    path: Path, runs: Mapping[str, Callable[[], Any]], made: Any, page: Callable[[dict[str, Any]], str]
) -> None:
    """Add the records that are missing to a file, each with the page of all when it is there, and print the page.

    Args:
        path: The file.
        runs: What makes each record, by its key, in the order in which they are run.
        made: What `made_with` returns.
        page: Makes the page of all records.
    """
    records = load(path)
    for key, run in runs.items():
        if key not in records:
            records[key] = {**run(), "made": made}
            save(path, records)
            save_page(path, page(records))
            print(key, flush=True)
    print(page(records))


def by_setting(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return records whose keys are ``setting | row | seed`` by setting, row and seed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, record in results.items():
        setting, row, seed = key.split(" | ")
        found.setdefault(setting, {}).setdefault(row, {})[seed] = record
    return found


def leads(results: Mapping[str, Any], leader: str, rows_are: str, lead: str) -> str:
    """Return tables of the means over the seeds, and of how far one row is ahead of each, seed by seed.

    Args:
        results: The records, by ``setting | row | seed``.
        leader: The row that is compared with the others.
        rows_are: Head of the column with the names of the rows.
        lead: Head of the column of its leads.
    """
    lines = []
    for setting, rows in by_setting(results).items():
        lines += [
            f"\n{setting}, CIFAR-10 (JPEG copy):\n",
            f"| {rows_are} | seeds | FLOPs kept | test accuracy, last step (%) | {lead} |",
            "|---|---|---|---|---|",
        ]
        ours = {seed: record["accuracy"] for seed, record in rows.get(leader, {}).items()}
        for row, seeds in rows.items():
            accuracies = {seed: record["accuracy"] for seed, record in seeds.items()}
            ahead = [ours[seed] - accuracy for seed, accuracy in accuracies.items() if seed in ours]
            flops = statistics.mean(record["flops"] for record in seeds.values())
            cells = [row, len(seeds), f"{flops:.3f}", _percent(list(accuracies.values())), _percent(ahead)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _percent(values: list[float]) -> str:
    return spread([100 * value for value in values], 2) if values else "-"


def made_with(settings: argparse.Namespace, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Return how a result comes about.

    Args:
        settings: The options of the script; those that name places, or choose what is run, are left out.
        device: Where it runs, ``"cpu"`` or ``"cuda"``.
        more: Settings that are no options.

    Returns:
        ``settings``, ``hardware`` and the version of ``torch``.
    """
    options = {name: value for name, value in vars(settings).items() if name not in _NOT_SETTINGS}
    versions = {"hardware": hardware(device), "torch": torch.__version__}
    return json.loads(json.dumps({"settings": {**options, **more}, **versions}))  # as it is read again


def sign(record: dict[str, Any], made: dict[str, Any]) -> None:
    """Note in a new record how it comes about, and end the script if it was begun with other settings.

    A record of earlier days that does not say how it came about is left as it is.
    """
    if not record:
        record["made"] = made
    check(record, made)


def check(record: dict[str, Any], made: dict[str, Any]) -> None:
    """End the script if a record was made with other settings; one that does not say with which passes."""
    if "made" in record:
        check_settings(record["made"]["settings"], made["settings"])


def check_settings(before: dict[str, Any], now: dict[str, Any]) -> None:
    """End the script if what was begun has other settings."""
    if other := [name for name, value in now.items() if before.get(name) != value]:
        sys.exit(
            f"The results hold a record that was begun with other settings ({', '.join(other)}); give another file as "
            "--results, or the same settings."
        )


def hardware(device: str = "cpu") -> str:
    """Return the model of the GPU, or of the CPU and the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_model(description: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the system calls its processor, with the numbers that tell generations of one name apart."""
    if not description.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in description.read_text().partition("\n\n")[0].splitlines())
    known = {name.strip(): value.strip() for name, _, value in pairs}
    name = known.get("model name", platform.machine()).replace("(R)", "").replace("(TM)", "")
    return f"{name} (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else name


def records_of(content: Any) -> Iterator[dict[str, Any]]:
    """Return what `made_with` has noted, of every record in a file."""
    if isinstance(content, dict):
        if "hardware" in content:
            yield content
        for part in content.values():
            yield from records_of(part)
    elif isinstance(content, list):
        for part in content:
            yield from records_of(part)


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"
