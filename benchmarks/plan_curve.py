"""What `lightning-prune plan` says of budgets before any training, against what 120 steps of fine-tuning give.

Runs `plan` at six budgets with several methods on a published network, then `prune` for each of its rows, and trains
each of these files on with the data and settings of `criteria_finetune.py`. The rank correlation between the accuracy
that `plan` has told and the one after training is taken over all rows, and over the methods at each budget, where it is
harder. All accuracies are of the validation split: a part of it for `plan`, the whole for the other.

The page is written beside the file of results, which is added to as it comes::

    python benchmarks/plan_curve.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt [--results FILE]
"""

import argparse
import contextlib
import io
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import stored
import torch
from criteria_finetune import NETWORKS as TRAINED
from criteria_finetune import Runner, add_usual, assignment, run_or_show
from scipy import stats

import lightning_prune as lp
from lightning_prune.cli import plan as plan_command
from lightning_prune.cli import prune as prune_command
from lightning_prune.models import ImageClassifier

KEEP = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15)
METHODS = ("coherent_obs", "l1", "group_magnitude", "lamp", "uniform", "random")
NETWORKS = {
    "resnet20": ["--model.network=resnet20"],
    "vgg11_bn/4": ["--model.network=vgg11_bn", "--model.network_args.width=0.25"],
}
CONFIG = "resnet20_cifar10_search"  # for its data, and the settings of the model that weights do not say


def options(network: str, settings: argparse.Namespace) -> list[str]:
    """Return what both commands are told: the data, the network, and where to run."""
    return [
        "--config", CONFIG, *NETWORKS[network], f"--data.root={settings.root}",
        "--accelerator", "cpu", "--torch_threads", "1",
    ]  # fmt: skip


def surveyed(network: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Return what `plan` has written; it goes on where it was."""
    path = Path(settings.work) / f"{network.replace('/', '-')}.plan.json"
    budgets = [str(keep) for keep in KEEP]
    plan_command.main([
        settings.weights[network], "--out", str(path), "--keep", *budgets, "--method", *METHODS,
        *options(network, settings),
    ])  # fmt: skip
    return json.loads(path.read_text())


def fine_tuned(network: str, method: str, keep: float, settings: argparse.Namespace) -> float:
    """Prune by the command as a row of the survey says, train on, and return the accuracy."""
    path = Path(settings.work) / "pruned.ckpt"
    with contextlib.redirect_stdout(io.StringIO()):
        prune_command.main([
            settings.weights[network], str(path), "--keep", str(keep), "--method", method, *options(network, settings),
        ])  # fmt: skip
    model = lp.load_pruned(ImageClassifier, path).network.to(memory_format=torch.channels_last)
    runner = Runner(network, 0, settings)
    steps, lr = TRAINED[network][3]
    runner.train(model, steps, lr, first_epoch=1000)
    return runner.accuracy(model, runner.data.val_set)


def run(settings: argparse.Namespace, records: dict[str, Any]) -> None:
    """Run what is missing; each record and the page are saved when they are there."""
    made = stored.made_with(settings)
    for network in settings.networks:
        wanted = [f"{network} | {method} | {keep:g}" for method in METHODS for keep in KEEP]
        if all(key in records for key in wanted):
            continue
        for row in surveyed(network, settings)["rows"]:
            key = f"{network} | {row['method']} | {row['keep']:g}"
            if key in records:
                continue
            record = {"told": row["metrics"].get("val/accuracy"), "refusal": row["refusal"], "seconds": row["seconds"]}
            if not row["refusal"]:
                record |= {"flops": row["kept"]["flops"]}
                record |= {"tuned": fine_tuned(network, row["method"], row["keep"], settings)}
            records[key] = {**record, "made": made}
            stored.save(settings.results, records)
            stored.save_page(settings.results, page(records))


def page(records: dict[str, Any]) -> str:
    """Return the curve of each method, told and fine-tuned, and how well the one ranks as the other does."""
    lines = ["# What plan tells of budgets, and what fine-tuning gives", ""]
    for network, methods in stored.by_setting(records).items():
        heads = [f"{keep:g}" for keep in KEEP]
        lines += [
            f"{network}, validation accuracy right after the compensated prune as `plan` tells it, and after "
            f"{TRAINED[network][3][0]} steps (%):",
            "",
            f"| method | {' | '.join(heads)} | seconds for each, of `plan` |",
            "|---|" + "---|" * (len(KEEP) + 1),
        ]
        lines += [_row(method, budgets) for method, budgets in methods.items()]
        lines += ["", *_correlations(methods), ""]
    return "\n".join(lines)


def _row(method: str, budgets: dict[str, dict[str, Any]]) -> str:
    cells = []
    for keep in KEEP:
        record = budgets.get(f"{keep:g}", {})
        cells.append(f"{100 * record['told']:.1f}, {100 * record['tuned']:.1f}" if "tuned" in record else "-")
    seconds = statistics.median(record["seconds"] for record in budgets.values())
    return f"| {method} | {' | '.join(cells)} | {seconds:.0f} |"


def _correlations(methods: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    rows = [record for budgets in methods.values() for record in budgets.values() if "tuned" in record]
    lines = []
    if len(rows) > len(METHODS):
        lines += [f"Rank correlation over all {len(rows)} networks: {_rank_correlation(rows):.2f}."]
    by_keep = {keep: [budgets.get(f"{keep:g}", {}) for budgets in methods.values()] for keep in KEEP}
    full = {keep: rows for keep, rows in by_keep.items() if len(rows) > 2 and all("tuned" in row for row in rows)}
    cells = [f"{_rank_correlation(rows):.2f} at {keep:g}" for keep, rows in full.items()]
    return [*lines, *([f"Over the methods at one budget: {', '.join(cells)}."] if cells else [])]


def _rank_correlation(rows: list[dict[str, Any]]) -> float:
    return float(stats.spearmanr([row["told"] for row in rows], [row["tuned"] for row in rows]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--weights", nargs="+", type=assignment, required=True, help="trained weights, as network=file")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=list(NETWORKS))
    add_usual(parser, "plan_curve.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_or_show(settings, run, page)


if __name__ == "__main__":
    main()
