"""Prune published networks to half the FLOPs with one command, without training, and export them in int8 with another.

Runs `lightning-prune prune` in a process of its own, and notes what it prints: the accuracy of the module's own
validation before and right after, what is kept, how fast that is, and seconds in all, from the start of Python on. Then
`lightning-prune export --quantize int8` writes what was left; the accuracy of its file is noted beside that in float.
``--root`` holds CIFAR-10 as image files in ``train/<class>/`` and ``test/<class>/``, ``--weights`` the published files.
The page is written beside the file of results, which is added to as it comes::

    python benchmarks/prune_command.py --root data/cifar10-jpeg --weights data/pretrained [--results FILE]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import stored
import torch

RESULTS = Path(__file__).parent / "results" / "prune_command.json"
NETWORKS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
CONFIG = "resnet20_cifar10_search"  # for its data, and the settings of the model that weights do not say


def run(network: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Run both commands, and return what they printed, and how long the first took."""
    project = ["--config", CONFIG, f"--model.network={network}", f"--data.root={settings.root}"]
    with tempfile.TemporaryDirectory() as folder:
        small = f"{folder}/small.ckpt"
        on_cpu = ["--accelerator", "cpu", "--torch_threads", "1"]
        weights = str(settings.weights / NETWORKS[network])
        start = time.perf_counter()
        printed = command("prune", weights, small, "--keep", str(settings.keep), *project, *on_cpu)
        seconds = time.perf_counter() - start
        exported = command("export", small, f"{folder}/small.onnx", "--quantize", "int8", *project)
        both = [each.replace(folder, ".") for each in (printed, exported)]
    return {"printed": both[0], "exported": both[1], "seconds": seconds, **read(printed), **read_int8(exported)}


def command(*words: str) -> str:
    """Run a command in a process of its own, and return what it prints; end where it fails."""
    process = subprocess.run(
        [sys.executable, "-m", "lightning_prune", *words],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if process.returncode:
        sys.exit(process.stderr)
    return process.stdout


def read(printed: str) -> dict[str, Any]:
    """Return the accuracies, what is kept and how fast it is, from what the command prints."""
    ((before, pruned, after),) = re.findall(
        r"^val/accuracy: ([\d.]+) before, ([\d.]+) pruned, ([\d.]+) compensated", printed, re.MULTILINE
    )
    (kept,) = re.findall(r"^([\d.]+) of the flops is kept", printed, re.MULTILINE)
    return {"before": float(before), "pruned": float(pruned), "after": float(after), "kept": float(kept)}


def read_int8(printed: str) -> dict[str, Any]:
    """Return the accuracies in int8 and in float, from what the command prints."""
    ((in_int8, in_float),) = re.findall(r"^accuracy of .*: ([\d.]+) in int8, ([\d.]+) in float", printed, re.MULTILINE)
    return {"int8": float(in_int8), "float": float(in_float)}


def page(records: dict[str, Any]) -> str:
    """Return a table of all networks."""
    lines = [
        "# One command, without training",
        "",
        "Published weights, half the FLOPs, CIFAR-10 (JPEG copy), accuracy on the validation split, a tenth of the "
        "training images; the weights were trained on the originals of these. In int8 and in float: of the files that "
        "are exported then, on a part of that split. One thread.",
        "",
        "| network | FLOPs kept | accuracy before | pruned | compensated | in int8, in float | seconds in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        lines.append(
            f"| {name} | {record['kept']:.3f} | {record['before']:.4f} | {record['pruned']:.4f} "
            f"| {record['after']:.4f} | {record['int8']:.4f}, {record['float']:.4f} | {record['seconds']:.0f} |"
        )
    for name, record in records.items():
        lines += [
            "",
            f"What is printed for {name}:",
            "",
            "```",
            record["printed"].strip(),
            "",
            record["exported"].strip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    runs = {name: partial(run, name, settings) for name in settings.networks}
    stored.complete_page(settings.results, runs, stored.made_with(settings), page)


if __name__ == "__main__":
    main()
