"""Joint training and pruning: an agent chooses widths while the weights learn, and the weights follow its choice."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.callbacks.alignment import Alignment, Pull
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.batches import ValidationBatches, check_limit, training_batches
from lightning_prune.callbacks.monitoring import check_candidates, check_measure, measure_in
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.schedule import check_whole_number
from lightning_prune.callbacks.state import under
from lightning_prune.callbacks.trainer_state import log_epoch, loss_scale, unlogged
from lightning_prune.callbacks.trial_run import is_trial
from lightning_prune.candidates import Memory
from lightning_prune.criteria.registry import find, needs_data
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning import metric_named
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.reporting.loggers import say
from lightning_prune.search import CONTROLS, make_search
from lightning_prune.search.pruning_problem import PruningProblem, accuracy_of
from lightning_prune.search.width_search import WidthSearch

__all__ = ["RLJointPruneCallback"]


# Settings that choices of widths, and what an agent has learned, mean something under alone.
_OF_BUDGET = ("keep", "metric", "round_to", "min_channels", "ignore", "criterion")
_OF_SEARCH = (
    "agent", "episodes", "seed", "search_settings", "start_epoch", "compensate_candidates", "candidate_batches",
    "limit_batches", "evaluate", "monitor", "mode",
)  # fmt: skip


class RLJointPruneCallback(PruningCallback):
    """Let an agent choose how much each layer gives, while the network trains and is drawn towards that choice.

    After a warm-up, at the start of each epoch, the agent plays episodes: it walks through the network and chooses the
    widths of all groups within the budget, and earns the accuracy on the validation split that the network has with
    them. The best choice on the weights as they are then comes into force: a soft penalty, added to the loss whatever
    the training step does, draws the weights of the channels that would be pruned towards zero. Before epoch
    ``start_epoch`` they are pruned, and training goes on.

    Args:
        start_epoch: Number of epochs before the channels are pruned, at least 1.
        agent: ``"sac"``, ``"ppo-clip"``, ``"ppo-kl"``, ``"ppo-cim"``, ``"ppo-cim-1"``, ``"ppo-cim-2"``,
            ``"reinforce"`` or ``"random"``, or the import path of your own, see `make_agent`; or a search without one,
            ``"uniform"``, ``"greedy"``, ``"evolution"``, ``"halving"`` or ``"skip-whole"``, see `make_search`.
        warmup_epochs: Number of epochs of plain training at first, below ``start_epoch``.
        search_epochs: Number of epochs with episodes after that; the choice is kept then. Default: all up to the prune.
        episodes: Number of episodes in a round, at least 2.
        rounds: Number of rounds in each of them; the agent learns after each. Many in a single epoch are a search on
            weights that do not change.
        strength: Weight of the penalty, at least 0; by default it follows the schedule, see `Pull`: in each step it is
            such that the norms would reach zero by the prune, if nothing else acted on them.
        squared: Whether the norms that make up the penalty are squared.
        finalists: How many of the best choices of an epoch are measured again in the next one.
        compensate_candidates: How each choice is compensated before it is measured, whatever ``compensate`` says of
            the prune: ``"none"``, ``"statistics"``, ``"fold"`` or ``"refit"``.
        candidate_batches: Number of training batches that choices are compensated on.
        limit_batches: Number of validation batches to measure on, of samples drawn at random, the same ones each time;
            default all that validation runs on.
        within: What chooses the channels within a group: a criterion that needs no data.
        evaluate: Given the LightningModule and a batch, returns loss and accuracy (any score; higher is better) as
            means over its samples; in YAML the import path of a function.
        monitor: Name of a metric that the module's own ``validation_step`` logs, to be measured in place of accuracy;
            the mean over batches counts.
        mode: ``"max"`` if much of that metric is good, ``"min"`` if little is.
        seed: Seed of the agent.
        search_settings: As for `PolicySearch`: ``agent_updates``, ``environment_updates``, ``environment_size``,
            ``rewarded``, ``agent_settings``; or those of the search without an agent.
        compensate: As for `PruningCallback`; the method itself knows of none.
        settings: As for `PruningCallback`, without ``criterion``, ``steps`` and ``every_n_epochs``.

    Raises:
        ValueError: As `PruningCallback`; when training starts also if there is no validation split, or its batches
            are not ``(inputs, labels)`` of a classifier and neither ``evaluate`` nor ``monitor`` is given.

    Note:
        Ganjdanesh et al., "Jointly Training and Pruning CNNs via Learnable Agent Guidance and Alignment" (CVPR 2024),
        known from its abstract and a reproduction. Interpretation: a channel group of any kind stands for a layer;
        each step earns what its episode earned; a choice is always measured on current weights, and the best of the
        last episodes, of the policy without exploration and of the finalists of the epoch before is in force. With
        manual optimization each ``manual_backward`` counts as a loss.

    Example:
        >>> callback = RLJointPruneCallback(keep=0.5, start_epoch=40, warmup_epochs=10, agent="ppo-clip")
        >>> [callback.searches(epoch) for epoch in (9, 10, 39, 40)]
        [False, True, True, False]
    """

    @dataclass
    class State(PruningCallback.State):
        """What has to survive a checkpoint.

        Attributes:
            search: State of the policy search after the last episodes.
            searched_epoch: The last epoch that episodes were played before.
            best: Widths of the choices that earned most in the last round, best first.
            in_force: Channels to keep, by group, of the choice that the weights are drawn towards.
            drawn_epoch: The last epoch that `drawn` was set before.
            drawn: What a step of that epoch is to take off a norm, times what gradients are multiplied by for that.
            figures: What is logged of the last round, by name.
        """

        search: dict[str, Any] | None = field(default=None, metadata=under(*_OF_BUDGET, *_OF_SEARCH))
        searched_epoch: int = field(default=-1, metadata=under(*_OF_BUDGET))
        best: list[list[int]] = field(default_factory=list, metadata=under(*_OF_BUDGET))
        in_force: dict[str, list[int]] = field(default_factory=dict, metadata=under(*_OF_BUDGET))
        drawn_epoch: int = -1
        drawn: float = 0.0
        figures: dict[str, float] = field(default_factory=dict, metadata=under(*_OF_BUDGET))

    @dataclass
    class Run(PruningCallback.Run):
        """What exists while training goes on.

        Attributes:
            search: The policy search, until the prune.
            training: Batches to compensate choices on.
            memory: What was collected to compensate choices, for as long as the weights are the same.
            alignment: What draws the weights towards the choice in force.
            pull: What tells how strongly.
        """

        search: WidthSearch = field(init=False)
        training: list[Any] = field(default_factory=list)
        memory: Memory = field(default_factory=Memory)
        alignment: Alignment | None = None
        pull: Pull = field(init=False)

    cap = 0.8
    can_stop = False

    rankings = ("global",)

    state: State
    run: Run

    def __init__(
        self,
        start_epoch: int = 20,
        agent: str = "sac",
        warmup_epochs: int = 1,
        search_epochs: int | None = None,
        episodes: int = 10,
        rounds: int = 1,
        strength: float | None = None,
        squared: bool = False,
        finalists: int = 5,
        compensate_candidates: str = "statistics",
        candidate_batches: int = 10,
        limit_batches: int | None = None,
        within: str | dict[str, Any] = "l1",
        evaluate: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        monitor: str | None = None,
        mode: str = "max",
        seed: int = 0,
        search_settings: Mapping[str, Any] | None = None,
        compensate: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(start_epoch=start_epoch, criterion=within, compensate=compensate, **settings)
        if self.steps != 1:
            raise ValueError(f"RLJointPruneCallback prunes all channels at once; set steps to 1, not {self.steps}.")
        if not metric_named(self.metric).counted:
            raise ValueError("RLJointPruneCallback needs a metric that can be counted: flops, params or channels.")
        if not 0 <= warmup_epochs < start_epoch:
            raise ValueError(f"warmup_epochs must be below start_epoch={start_epoch}; got {warmup_epochs!r}.")
        check_whole_number("rounds", rounds, 1)
        if (strength or 0.0) < 0 or finalists < 0:
            raise ValueError("strength and finalists must be at least 0.")
        check_candidates(compensate_candidates, candidate_batches)
        check_limit(limit_batches)
        check_measure(evaluate, monitor, mode)
        self.agent = agent
        self.episodes = episodes
        self.rounds = rounds
        self.seed = seed
        self.search_settings = dict(search_settings or {})
        self.warmup_epochs = warmup_epochs
        self.search_epochs = search_epochs
        self._make_search(steps=1)  # refuses wrong settings
        self.strength = strength
        self.squared = squared
        self.finalists = finalists
        self.compensate_candidates = compensate_candidates
        self.candidate_batches = candidate_batches
        self.limit_batches = limit_batches
        self.evaluate = evaluate
        self.monitor = monitor
        self.mode = mode

    def searches(self, epoch: int) -> bool:
        """Tell whether the agent plays episodes before an epoch."""
        end = self.start_epoch if self.search_epochs is None else self.warmup_epochs + self.search_epochs
        return self.warmup_epochs <= epoch < min(end, self.start_epoch)

    # -- what to prune ---------------------------------------------------------------------------------------------

    @override
    def check_criterion(self) -> None:
        super().check_criterion()
        if needs_data(find(self.criterion)):
            raise ValueError(f"Criterion {self.criterion!r} needs data, and RLJointPruneCallback gives it none.")

    @override
    def make_plan(
        self, trainer: "pl.Trainer", graph: ChannelGraph, keep: float
    ) -> tuple[PruningPlan, dict[str, Tensor]]:
        """Choose the best of the finalists and of the policy, on the weights as they are now."""
        search, problem = self.run.search, self._problem()

        def finalists() -> np.ndarray:
            return _rows(search.settle(problem, trainer.current_epoch), self.state.best)

        plans = [problem.plan(widths) for widths in decided_by_first_rank(trainer, finalists)]
        best = plans[int(self.measure(plans).argmax())]
        say(f"{self.agent}: {search.census()}")
        problem.bounds.tell(best)
        self._forget_search()
        return best, problem.scores

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def prepare(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        if self.steps_done == self.steps:
            return
        epoch = trainer.current_epoch
        never_searched = self.state.searched_epoch < 0 < len(self._search_epochs_from(0))
        if epoch >= self.start_epoch and never_searched:
            raise ValueError(
                f"RLJointPruneCallback has nothing to choose from: the run goes on at epoch {epoch}, from a checkpoint "
                f"without its episodes, which come before start_epoch={self.start_epoch}. Raise start_epoch."
            )
        self.run.search = self._make_search(len(graph.groups))
        if self.state.search is not None:
            self.run.search.load_state_dict(self.state.search)
        if self.compensate_candidates != "none":
            self.run.training = training_batches(trainer, self.candidate_batches, self.seed)
        self.run.evaluate = measure_in(self)
        self.measure([PruningPlan()], limit=1)  # refuses now what would fail later

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        epoch = trainer.current_epoch
        trying_out = is_trial(trainer)
        is_due = (trying_out or self.searches(epoch)) and self.state.searched_epoch < epoch
        if self.steps_done < self.steps and is_due:
            with unlogged(pl_module):
                self._play_rounds(trainer, 1 if trying_out else self.rounds)
        self._align()
        for name, value in self.state.figures.items():
            log_epoch(pl_module, f"agent/{name}", value)

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not a term of the loss that backward runs through: here it holds whatever the training step returns, and the
        # gradients of distributed training, averaged by now, get what is the same on all ranks.
        if self.run.alignment is not None:
            accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.run.alignment.add_gradient(self._strength() * loss_scale(trainer) / accumulated)

    # -- episodes --------------------------------------------------------------------------------------------------

    def measure(self, plans: list[PruningPlan], limit: int | None = None) -> Tensor:
        """Return the accuracy on the validation split with each plan.

        Args:
            plans: The plans.
            limit: Number of validation batches; default as the callback was told.

        Returns:
            (plans,) accuracy, the same on every rank.
        """
        batches = ValidationBatches(self.run.trainer, limit or self.limit_batches, type(self).__name__)
        measure = accuracy_of(
            self.run.graph,
            batches,
            evaluate=self.run.evaluate,
            compensate=self.compensate_candidates,
            compensate_batches=self.run.training,
            memory=self.run.memory,
            own_data=True,
        )
        return measure(plans)

    def _play_rounds(self, trainer: "pl.Trainer", rounds: int) -> None:
        """Play the rounds of one epoch, and note the state of the search after them."""
        rounds_later = self.rounds * len(self._search_epochs_from(trainer.current_epoch + 1))
        for done in range(1, rounds + 1):
            self._play_and_learn(trainer, rounds - done + rounds_later)
        self.state.search = self.run.search.state_dict()
        self.state.searched_epoch = trainer.current_epoch

    def _play_and_learn(self, trainer: "pl.Trainer", rounds_to_come: int) -> None:
        """Play one round, learn from it, and put the best choice in force."""
        search, problem, epoch = self.run.search, self._problem(), trainer.current_epoch
        began = time.monotonic()

        def choices() -> tuple[np.ndarray, int]:
            explored = search.explore(problem, epoch)
            return _rows(explored, search.settle(problem, epoch), self.state.best), len(explored)

        widths, count = decided_by_first_rank(trainer, choices)  # (choices, groups), those of the episodes first
        plans = [problem.plan(choice) for choice in widths]
        with progress(f"Episodes before epoch {epoch}"):
            rewards = self.measure(plans)
        explored = rewards[:count]
        losses = decided_by_first_rank(trainer, lambda: search.learn(explored))
        rewards = rewards.where(torch.from_numpy(problem.within_budget(widths)), -torch.inf)
        best_first = rewards.argsort(descending=True, stable=True).tolist()
        best_plan = plans[best_first[0]]
        # The one in force is always among those that are measured again.
        self.state.best = _distinct(widths[best_first].tolist())[: max(1, self.finalists)]
        self.state.in_force = {name: list(group.kept) for name, group in best_plan.groups.items()}
        mean, greatest = float(explored.mean()), float(rewards.max())
        self.state.figures = {"reward": mean, "best_reward": greatest, **losses}
        seconds_to_come = rounds_to_come * (time.monotonic() - began)
        say(
            f"Episodes before epoch {epoch}: reward {mean:.4f} on average, {greatest:.4f} in force; "
            f"{rounds_to_come} rounds to come, {seconds_to_come:.0f} s"
        )

    def _align(self) -> None:
        """Draw weights towards what is in force."""
        if self.steps_done == self.steps or not self.state.in_force:
            return
        kept = {name: torch.tensor(channels) for name, channels in self.state.in_force.items()}
        alignment = Alignment(self.run.graph, self.run.graph.plan(kept), self.squared)
        self.run.alignment = alignment
        self.run.pull = Pull(self.run.trainer.optimizers, alignment.parameters())
        epoch = self.run.trainer.current_epoch
        if self.state.drawn_epoch < epoch:
            self.state.drawn_epoch = epoch
            self.state.drawn = alignment.to_vanish() * self.run.pull.scale() / self._steps_to_come()
        self.state.figures["alignment"] = alignment.penalty()

    def _strength(self) -> float:
        """Return the weight of the penalty in the step at hand."""
        if self.strength is not None:
            return self.strength
        learning_rate = self.run.pull.learning_rate()
        return self.state.drawn / learning_rate if learning_rate > 0 else 0.0  # nothing moves without

    def _steps_to_come(self) -> float:
        """Return the number of optimizer steps until the prune, as far as it can be told."""
        trainer = self.run.trainer
        in_epoch: float = trainer.num_training_batches / trainer.accumulate_grad_batches
        if in_epoch == float("inf"):  # a stream of unknown length, of which an epoch has passed or not
            in_epoch = trainer.global_step / trainer.current_epoch if trainer.current_epoch else in_epoch
        return in_epoch * (self.start_epoch - trainer.current_epoch)

    def _search_epochs_from(self, first: int) -> list[int]:
        """Return the epochs from a first one on that episodes come before."""
        return [epoch for epoch in range(first, self.start_epoch) if self.searches(epoch)]

    def _problem(self) -> PruningProblem:
        return PruningProblem(
            self.run.graph,
            keep=self.keep,
            metric=self.metric,
            criterion=self.criterion,
            round_to=int(self.round_to),
            min_channels=self.min_channels,
            cap=self.cap,
        )

    def _make_search(self, steps: int) -> WidthSearch:
        settings = self.search_settings
        if self.agent not in CONTROLS:
            settings = {"environment_size": 128, **settings}
        return make_search(
            self.agent,
            steps=steps,
            episodes=self.episodes,
            evaluations=self.episodes * self.rounds * len(self._search_epochs_from(0)),
            epochs=self.start_epoch + 1,
            seed=self.seed,
            **settings,
        )

    def _forget_search(self) -> None:
        """Drop what served to choose the channels, which now have been chosen."""
        self.state = replace(
            self.state, search=None, searched_epoch=-1, best=[], in_force={}, drawn_epoch=-1, drawn=0.0, figures={}
        )
        self.run.alignment = None
        self.run.training = []
        del self.run.search


def _rows(*choices: Any) -> np.ndarray:
    """Join choices of widths, of which some may be empty, to one array of (choices, groups)."""
    return np.concatenate([np.asarray(widths, dtype=np.int64) for widths in choices if len(widths)])


def _distinct(rows: list[list[int]]) -> list[list[int]]:
    """Return rows without repetitions, in the order of their first appearance."""
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]
