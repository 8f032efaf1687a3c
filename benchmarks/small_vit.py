"""Prune a small vision transformer to half the FLOPs by each kind of channels and by all: what accuracy is left?

The network is trained once per seed. From it every row prunes once, by `coherent_obs` within groups that are built
alike (isomorphic ranking) and with the same images of the training set, plainly or with the weights refitted; what is
left is trained on with the same data order, steps and learning rate. Rows prune the hidden channels of the MLPs alone,
whole heads, the width of queries and keys, that of values, the stream, or several of these; "one list" compares the
channels of all kinds, and two controls choose channels at random. A kind that cannot give half the FLOPs alone gives
them until an eighth of its channels is kept, and the column of FLOPs says so. A kind that the engine does not free is
skipped with a message. Accuracy is that on the test images after the last step; nothing is chosen by it.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/small_vit.py --root data/cifar10-jpeg [--rows MLP all] [--methods refit] [--seeds 3] [--table]
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import stored
import torch
from criteria_finetune import Runner, time_left
from finetune_rows import EXAMPLE
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import SmallImageViT
from lightning_prune.planning import CostModel
from lightning_prune.pruning_plan import PruningPlan

SIZE = {"width": 64, "depth": 4, "num_heads": 4, "hidden": 256}
SETTING = "ViT of 4 blocks, 64 wide"
HALF, EIGHTH = 0.5, 0.125
WARM_UP = 0.1  # of the steps
WHOLE = "not pruned"
METHODS = ("none", "refit")
# By what the last module is called that a group is named by, where the engine says of its kind no more than "channels".
KIND_OF_MODULE = {
    "linear1": "MLP", "attention.query": "query-key", "attention.value": "value", "stem.3": "stream", "stem.0": "stem",
}  # fmt: skip
ATTENTION = ("heads", "query-key", "value")
# Kinds, criterion and ranking of each row.
ROWS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "MLP": (("MLP",), "coherent_obs", "isomorphic"),
    **{kind: ((kind,), "coherent_obs", "isomorphic") for kind in (*ATTENTION, "stream")},
    "MLP and attention": (("MLP", *ATTENTION), "coherent_obs", "isomorphic"),
    "all": (("MLP", *ATTENTION, "stream", "stem"), "coherent_obs", "isomorphic"),
    "all, one list": (("MLP", *ATTENTION, "stream", "stem"), "coherent_obs", "global"),
    "random, MLP": (("MLP",), "random", "isomorphic"),
    "random, all": (("MLP", *ATTENTION, "stream", "stem"), "random", "isomorphic"),
}


def kind_of(graph: ChannelGraph, name: str) -> str:
    """Return of what kind the channels of a group are."""
    if graph.groups[name].kind != "channels":
        return graph.groups[name].kind
    module = name.partition("#")[0]
    return next((kind for ending, kind in KIND_OF_MODULE.items() if module.endswith(ending)), "channels")


class Transformer(Runner):
    """The network of one seed, and the rows that start from it."""

    def __init__(self, seed: int, settings: argparse.Namespace) -> None:
        super().__init__(SETTING, seed, settings)
        self.start = self.network()
        self.graph = lp.trace(self.start, EXAMPLE)
        self.scores = cache(self._scores)

    def network(self) -> nn.Module:
        """Return the network to prune, trained now or before."""
        file = Path(self.settings.work) / f"vit-{self.seed}.pt"
        L.seed_everything(self.seed, verbose=False)
        model = SmallImageViT(**SIZE)

        def train() -> dict[str, torch.Tensor]:
            self.train(model, self.settings.steps, self.settings.lr)
            return model.state_dict()

        model.load_state_dict(stored.kept(file, train))
        return model.eval()

    def train(self, model: nn.Module, steps: int, lr: float, first_epoch: int = 0, **_: Any) -> None:
        """Train for some steps; the learning rate rises for a tenth of them, and then falls to 0 along a line."""
        optimizer = AdamW(model.parameters(), lr, weight_decay=0.05)
        warm_up = WARM_UP * steps
        factors = LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up)))
        model.train()
        for batch in self.training_batches(steps, first_epoch):
            images, labels = self.served(batch)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            factors.step()
        model.eval()

    def _scores(self, criterion: str) -> dict[str, torch.Tensor]:
        if criterion == "random":
            return criteria.score(self.graph, {"name": "random", "seed": self.seed})
        return criteria.score(self.graph, criterion, [images for images, _ in self.batches()])

    def plan(self, row: str) -> PruningPlan | None:
        """Return the plan of a row; None where the engine frees no channels of its kinds."""
        kinds, criterion, ranking = ROWS[row]
        names = [name for name in self.graph.groups if kind_of(self.graph, name) in kinds]
        if not names:
            return None
        cost = CostModel(self.graph, "flops")
        least = cost({name: max(1, int(EIGHTH * self.graph.groups[name].size)) for name in names}) / cost.original
        scores = {name: self.scores(criterion)[name] for name in names}
        return lp.plan(self.graph, scores, max(HALF, least), round_to=1, ranking=ranking)

    def prune(self, row: str, method: str) -> dict[str, Any]:
        """Prune a copy by a row, train it on, and return what it is worth."""
        model, began = copy.deepcopy(self.start), time.process_time()
        found: dict[str, Any] = {"flops": 1.0}
        if row != WHOLE:
            plan = self.plan(row)
            lp.prune(model, plan, compensate=method, batches=[images for images, _ in self.batches()])
            found = {"flops": plan.budget["achieved"], "widths": plan.widths}
        found["seconds"] = {"prune": round(time.process_time() - began, 1)}
        found["pruned"] = self.accuracy(model, self.data.test_set, every=5)
        self.train(model, self.settings.finetune_steps, self.settings.finetune_lr, first_epoch=1000)
        found["accuracy"] = self.accuracy(model, self.data.test_set)
        found["validation"] = self.accuracy(model, self.data.val_set)
        return {**found, "time": time_left(model, self.start)}


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    made = stored.made_with(settings, schedule=SIZE)
    for seed in range(settings.seeds):
        wanted = {f"{SETTING} | {WHOLE} | {seed}": (WHOLE, "none")} | {
            f"{SETTING} | {row}, {method} | {seed}": (row, method)
            for row in settings.rows
            for method in settings.methods
        }
        if all(key in results for key in wanted):
            continue
        network = Transformer(seed, settings)
        runs: dict[str, Callable[[], Any]] = {}
        for key, (row, method) in wanted.items():
            if row != WHOLE and network.plan(row) is None:
                print(f"{key}: skipped, since the engine frees no channels of this kind", flush=True)
                continue
            runs[key] = partial(network.prune, row, method)
        stored.complete(settings.results, results, runs, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="to train the network")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--finetune-steps", type=int, default=200, help="to train what is left")
    parser.add_argument("--finetune-lr", type=float, default=5e-4)
    parser.add_argument("--images", type=int, default=1024, help="training images that criterion and refit look at")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--work", default="logs/small_vit", help="where trained networks are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "small_vit.json")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    results = stored.load(settings.results)
    if not settings.table:
        run(settings, results)
    print(stored.leads(results, "all, refit", "kinds and compensation", "lead of `all, refit`"))


if __name__ == "__main__":
    main()
