"""Time trace + magnitude + plan + prune against the constructor and one step of Torch-Pruning.

Same model, same process, in turns, each on a fresh copy: the median of several rounds, in seconds of processor time on
one thread. Both remove half of the channels by L1 magnitude, ranked over all layers. Each network has a process of its
own, which is ended if it takes too long. Needs the ``benchmark`` extra and timm::

    python benchmarks/engine_vs_torch_pruning.py [--rounds 5] [--steps 50] [--results FILE] [networks ...]

A run that is stopped goes on where it was. The page is written beside the file.
"""

import argparse
import copy
import gc
import logging
import multiprocessing
import statistics
import time
import warnings
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import stored
import torch
import torchvision
from torch import nn

import lightning_prune as lp

RESULTS = Path(__file__).parent / "results" / "engine.json"
NETWORKS = [
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "alexnet", "densenet121", "inception_v3", "efficientnet_v2_s",
    "convnext_tiny", "regnet_y_16gf", "vit_b_16", "shufflenet_v2_x1_0", "swin_t", "res2net50_26w_4s",
]  # fmt: skip
PARTS = ("trace", "score", "plan", "prune")
LIMIT, MEAN_LIMIT, ITERATIVE_LIMIT = 0.8, 0.2, 0.1
LONGEST = 900  # seconds after which the process of a network is ended
HEAD = ["network", "lightning-prune (s)", *PARTS, "Torch-Pruning (s)", "times as long"]

Round = dict[str, float]


class Clock:
    """Seconds of processor time of each part of what is timed."""

    def __init__(self) -> None:
        gc.collect()  # what others have left is nobody's time
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.last = time.process_time()

    def note(self, part: str) -> None:
        """Count the time since the last note for a part."""
        now = time.process_time()
        self.spent[part] = self.spent.get(part, 0.0) + now - self.last
        self.last = now


def ours(model: nn.Module, x: torch.Tensor, steps: int) -> Round:
    clock = Clock()
    graph = lp.trace(model, x)
    clock.note("trace")
    for step in range(1, steps + 1):
        scores = lp.criteria.magnitude(graph)
        clock.note("score")
        plan = lp.plan(graph, scores, 1 - 0.5 * step / steps, "channels", round_to=1)
        clock.note("plan")
        lp.prune(model, plan)
        clock.note("prune")
    return clock.spent


def theirs(model: nn.Module, x: torch.Tensor, steps: int) -> float:
    import torch_pruning

    clock = Clock()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
    )
    for _ in range(steps):
        pruner.step()
    clock.note("all")
    return clock.spent["all"]


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    size = 299 if name == "inception_v3" else 224
    if name.startswith("res2net"):
        import timm

        model = timm.create_model(name)
    else:
        settings = {"init_weights": False} if size == 299 else {}
        model = torchvision.models.get_model(name, weights=None, **settings)
    return model.eval(), torch.randn(1, 3, size, size)


def compare(name: str, rounds: int, steps: int, report: Connection) -> None:
    """Send the seconds of each part, and of Torch-Pruning or what it raises, after each round."""
    torch.manual_seed(0)
    model, x = built(name)
    record: dict[str, Any] = {"ours": [], "theirs": [], "fails": ""}
    for _ in range(rounds):
        record["ours"].append(ours(copy.deepcopy(model), x, steps))
        report.send(record)
        if not record["fails"]:
            try:
                record["theirs"].append(theirs(copy.deepcopy(model), x, steps))
            except Exception as raised:
                record["fails"] = f"{type(raised).__name__}: {raised}".splitlines()[0][:100]
        report.send(record)
    report.close()


def compared_apart(name: str, rounds: int, steps: int, longest: float) -> dict[str, Any]:
    """Compare in a process of its own, and return what it has sent by the time that it ends or has to, in seconds."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=compare, args=(name, rounds, steps, sending))
    process.start()
    sending.close()
    record: dict[str, Any] = {"ours": [], "theirs": [], "fails": "its process died"}
    deadline = time.monotonic() + longest
    try:
        while receiving.poll(deadline - time.monotonic()):
            record = receiving.recv()
        record["fails"] = record["fails"] or f"is not done after {longest:g} s"
    except EOFError:
        if not record["theirs"]:
            record["fails"] = record["fails"] or "its process died"
    finally:
        process.kill()
        process.join()
    return record


# -- the page ----------------------------------------------------------------------------------------------------------


def page(records: dict[str, Any]) -> str:
    """Return the table of the networks, with the worst ratio and the geometric mean of those that both prune."""
    lines = ["# Engine", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    lines += [row(name, record) for name, record in records.items()]
    ratios = [ratio for record in records.values() if (ratio := ratio_of(record)) is not None]
    if ratios:
        lines += ["", summary(ratios, (LIMIT, MEAN_LIMIT))]
    return "\n".join(lines) + "\n"


def row(name: str, record: dict[str, Any]) -> str:
    """Return a line of the table."""
    if not record["ours"]:
        return f"| {name} | - | {'- | ' * len(PARTS)}- | {record['fails']} |"
    spent = [f"{statistics.median(one[part] for one in record['ours']):.3f}" for part in PARTS]
    all_ours = f"{statistics.median(map(total, record['ours'])):.3f}"
    other = f"{statistics.median(record['theirs']):.3f}" if record["theirs"] else record["fails"]
    ratio = ratio_of(record)
    shown = "-" if ratio is None else f"{ratio:.2f}"
    return f"| {name} | {all_ours} | {' | '.join(spent)} | {other} | {shown} |"


def ratio_of(record: dict[str, Any]) -> float | None:
    """Return the median over the rounds of our time by that of Torch-Pruning; None where that fails."""
    if not record["theirs"]:
        return None
    pairs = zip(record["ours"], record["theirs"], strict=False)
    return statistics.median(total(one) / other for one, other in pairs)


def total(spent: Round) -> float:
    return sum(spent.values())


def summary(ratios: list[float], limits: tuple[float, float]) -> str:
    mean = statistics.geometric_mean(ratios)
    return (
        f"Worst {max(ratios):.2f} (limit {limits[0]}), geometric mean {mean:.2f} (limit {limits[1]}), of the "
        f"{len(ratios)} networks that Torch-Pruning prunes."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="prune in this many steps with one graph; not kept")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds after which a network is given up")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ours(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.zeros(1, 4), 1)  # imports on first use
    kept = settings.steps == 1
    results = stored.load(settings.results) if kept else {}
    made = stored.made_with(settings, rival=metadata.version("torch-pruning"))
    for name in settings.networks:
        if name not in results:
            results[name] = {**compared_apart(name, settings.rounds, settings.steps, settings.longest), "made": made}
            print(row(name, results[name]), flush=True)
            if kept:
                stored.save(settings.results, results)
    ratios = [ratio for name in settings.networks if (ratio := ratio_of(results[name])) is not None]
    if ratios:
        print(summary(ratios, (LIMIT, MEAN_LIMIT) if kept else (ITERATIVE_LIMIT, ITERATIVE_LIMIT)))
    if kept:
        stored.save_page(settings.results, page(results))


if __name__ == "__main__":
    main()
