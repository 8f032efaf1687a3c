"""Prune every torchvision classification network to half of its FLOPs, export it to ONNX, and compare the outputs.

`lightning_prune.export` compares what ONNX Runtime makes of random images, in batches of 1, 2 and 5, with what the
pruned network makes of them: at most 1e-5 of the largest output apart. Weights are random, statistics of normalisation
included. The table is written after each network, and those that stand in it are not done again::

    python benchmarks/zoo_export.py [--table benchmarks/results/zoo_export.md] [networks ...]
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engine import torchvision_model
from zoo import size_of

import lightning_prune as lp
from lightning_prune.export import export

TABLE = Path(__file__).parent / "results" / "zoo_export.md"
HEAD = "| network | input | kept of flops | largest difference | file (MB) | export (s) |\n|---|---|---|---|---|---|"


def row(name: str) -> str:
    """Prune and export one network; returns a row of the table."""
    torch.manual_seed(0)
    model, size = torchvision_model(name, torch.float32), size_of(name)
    example = torch.zeros(1, 3, size, size)
    graph = lp.trace(model, example)
    plan = lp.plan(graph, lp.criteria.magnitude(graph), 0.5, "flops")
    lp.prune(model, plan)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        apart = export(model, example, Path(folder) / "model.onnx")
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
    kept = plan.budget["achieved"]
    return f"| {name} | {size} | {kept:.3f} | {apart:.0e} | {megabytes:.1f} | {time.perf_counter() - start:.0f} |"


def done(table: Path) -> dict[str, str]:
    """Return the rows that a table has, by network."""
    lines = table.read_text().splitlines() if table.is_file() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| network")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows if "BROKEN" not in line}


def write(table: Path, rows: dict[str, str]) -> str:
    """Write the table; returns its summary."""
    broken = sum("BROKEN" in line for line in rows.values())
    summary = f"{len(rows)} networks, {broken} broken or different."
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(["# Zoo, exported to ONNX", "", summary, "", HEAD, *rows.values(), ""]))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=torchvision.models.list_models(module=torchvision.models))
    parser.add_argument("--table", type=Path, default=TABLE)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = done(settings.table)
    print(HEAD)
    for name in settings.networks:
        if name not in rows:
            try:
                rows[name] = row(name)
            except Exception as raised:
                rows[name] = f"| {name} | BROKEN: {type(raised).__name__}: {str(raised)[:300]} |"
        print(rows[name], flush=True)
        summary = write(settings.table, rows)
    print(summary)


if __name__ == "__main__":
    main()
