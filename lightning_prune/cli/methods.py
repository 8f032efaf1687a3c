"""Methods that a trained network is pruned by without training: what scores its channels, and how these compete."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import criteria, planning, search
from lightning_prune.callbacks import PruningCallback
from lightning_prune.callbacks.batches import training_batches
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.criteria.registry import find, needs_loss
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.in_turns import forward_times
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.search.pruning_problem import Measure, PruningProblem, accuracy_of

__all__ = ["ALL", "CONTROLS", "DEFAULT", "EVALUATIONS", "SEARCHES", "AtOnce", "check_methods"]

_ROUNDS = 9  # of timing

DEFAULT = "coherent_obs"
UNIFORM = "uniform"
CONTROLS = ("random", UNIFORM)
"""What every other method has to beat: random channels, and the same share of every layer, by L1 within it."""
ALL = (
    DEFAULT,
    "taylor",
    "group_magnitude",
    "magnitude",
    "l1",
    "l2",
    "lamp",
    "batch_norm_scale",
    "fpgm",
    "apoz",
    "mean_activation",
    *CONTROLS,
)
"""All methods that take a few forward passes; ``oracle``, which takes one for each channel, is tried if it is named."""


SEARCHES = tuple(name for name in (*search.CONTROLS, *search.AGENTS) if name not in CONTROLS)
"""Searches for widths, with the scores of the default method; each takes as many measurements as `EVALUATIONS`."""
EVALUATIONS = 100
_EPISODES = 10


def check_methods(names: Sequence[str]) -> None:
    """Raise a ValueError unless all methods are known."""
    for name in names:
        if name != UNIFORM and name not in SEARCHES:
            find(name)


class AtOnce(PruningCallback):
    """Prune a trained network once, as soon as it could be trained, and end there.

    Args:
        method: A criterion, ``"uniform"``, or a search for widths.
        settings: As for `PruningCallback`.

    Attributes:
        times: Milliseconds of the original network and of the pruned one, in each of some turns.
        why: Why it is this method.
        census: What a search has tried, if it is one.
    """

    def __init__(self, method: str = DEFAULT, **settings: Any) -> None:
        self.times: list[list[float]] = []
        self.why = "as asked"
        super().__init__(start_epoch=0, criterion=_criterion_of(method), save_result=False, **settings)
        self.use(method)

    def use(self, method: str) -> None:
        """Prune by a method.

        Args:
            method: A criterion, ``"uniform"``, or a search for widths.
        """
        self.method = method
        self.census = ""
        self.criterion = _criterion_of(method)

    @override
    def check_criterion(self) -> None:
        find(self.criterion)  # those that need a loss get that of the training step

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = True  # before the first batch
        self.work(trainer, pl_module)

    def work(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Prune, and time the network before and after in turns."""
        self._prune(trainer, pl_module, 1)
        history = self.state.history
        assert history is not None
        prune = history.prunes[-1]
        plan = plan_in_force(pl_module) or PruningPlan()
        self.times = forward_times(self.run.graph, [{}, plan.widths], _ROUNDS, milliseconds=200)
        before, after = (statistics.median(times) for times in self.times)
        history.before = replace(history.before, latency_ms=before, metrics=prune.metrics.before)
        prune.after = replace(prune.after, latency_ms=after)
        history.after = replace(prune.after, metrics=prune.metrics.after)
        history.metrics_at_end = prune.metrics.after

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        pass

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        pass

    @override
    def checked_blocks(self, blocks: bool, criterion: str | dict[str, Any]) -> bool:
        """Accept any method: a criterion that tells nothing of blocks refuses them itself, others keep them."""
        return blocks

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        if self.method in (UNIFORM, *SEARCHES):
            graph = graph.channels()
        if not needs_loss(find(self.criterion)):
            return super().scores(trainer, graph)
        batches = self.run.batches.of_prune(1)
        return decided_by_first_rank(trainer, lambda: criteria.score(graph, self.criterion, batches, self._loss))

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        returned = self.run.batches.training_step(model, batch)
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"Method {self.method!r} needs the loss that training_step returns, and that of "
                f"{type(self.run.graph.model).__name__} returns none; choose another --method."
            )
        return loss

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        if self.method in SEARCHES:
            return self._searched(graph, scores, keep)
        return self.allocation(graph, scores, keep)

    def _searched(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        """Let a search choose the widths that leave the least loss in training, once the network is compensated."""
        if not planning.metric_named(self.metric).counted:
            raise ValueError(f"Method {self.method!r} needs a metric that can be counted: flops, params or channels.")
        problem = PruningProblem(
            graph.channels(),
            keep=keep,
            metric=self.metric,
            round_to=int(self.round_to),
            min_channels=self.min_channels,
            scores=scores,
        )
        searching = search.make_search(self.method, steps=len(problem), episodes=_EPISODES, evaluations=EVALUATIONS)
        measure = self._reward(graph)
        with progress(f"Searching by {self.method}", EVALUATIONS) as bar:
            while len(searching.tried) < EVALUATIONS and not searching.finished:
                widths = searching.explore(problem)
                searching.learn(measure([problem.plan(row) for row in widths]))
                bar.advance(len(widths))
        self.census = str(searching.census())
        best = searching.tried.best()
        found = searching.settle(problem)[0] if best is None else best[0]
        return problem.plan(found)

    def _reward(self, graph: ChannelGraph) -> Measure:
        """Return what rewards plans: less loss, on as many training batches as compensation looks at, and others."""
        batches = self.run.batches.of_prune(1)
        seen = training_batches(self.run.trainer, len(batches), seed=2, of_all_ranks=True)

        def evaluate(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            loss = self._loss(model, batch)
            return loss, -loss

        return accuracy_of(graph, seen, evaluate=evaluate, compensate="fold", compensate_batches=batches)

    @property
    def allocation(self) -> Callable[..., PruningPlan]:
        """What makes a plan of scores within a budget."""
        settings: dict[str, Any] = {
            "metric": self.metric,
            "round_to": self.round_to,
            "min_channels": self.min_channels,
        }
        if self.method != UNIFORM:
            return partial(planning.plan, **settings)
        return partial(_uniform, **settings)


def _criterion_of(method: str) -> str:
    if method in SEARCHES:
        return DEFAULT
    return "l1" if method == UNIFORM else method


def _uniform(graph: ChannelGraph, scores: Mapping[str, Tensor], keep: float, **settings: Any) -> PruningPlan:
    """Give every group the same share of the cut."""
    alike = dict.fromkeys(graph.channels().groups, 1.0)
    return planning.plan_by_layer(graph, alike, scores, keep, **settings)
