"""What the command line and ``import lightning_prune`` take beside ``import torch``.

Processes take turns, so that a machine that gets slower does so for all. Prints the median of the ratios to the
``import torch`` of the same turn, and the median of what is added::

    python benchmarks/import_time.py [--rounds 10]
"""

import argparse
import statistics
import subprocess
import sys
import time

TORCH = ["-c", "import torch"]
COMMANDS = {
    "import lightning_prune": ["-c", "import lightning_prune"],
    "lightning-prune report --help": ["-m", "lightning_prune", "report", "--help"],
    "lightning-prune --version": ["-m", "lightning_prune", "--version"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: 10)")
    rounds = parser.parse_args().rounds
    seconds(TORCH)  # files come from the disk the first time
    baselines: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        baselines.append(seconds(TORCH))
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    print(f"import torch: {statistics.median(baselines):.2f} s")
    for name, times in taken.items():
        ratios = [time / baseline for time, baseline in zip(times, baselines, strict=True)]
        added = [time - baseline for time, baseline in zip(times, baselines, strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} times that, {statistics.median(added):+.2f} s")


def seconds(command: list[str]) -> float:
    """Return how long Python takes for a command, from start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
