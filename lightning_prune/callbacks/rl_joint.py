"""Train and prune at the same time: an agent chooses widths while the weights learn, and weights follow its choice."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.search.policy_search import PolicySearch
from lightning_prune.search.pruning_problem import PruningProblem, accuracy_of
from lightning_prune.callbacks import trainer_state
from lightning_prune.callbacks.alignment import Alignment
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.batches import ValidationBatches, training_batches
from lightning_prune.candidates import classification
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.progress import progress
from lightning_prune.reporting.loggers import say

__all__ = ["RLJointPruneCallback"]


class RLJointPruneCallback(PruningCallback):
    """Let an agent choose how much each layer gives, while the network trains and is drawn towards that choice.

    After a warm-up, at the start of each epoch, the agent plays episodes: it walks through the network and chooses the
    widths of all groups within the budget, and earns the accuracy on the validation split that the network has with
    them. The best choice on the weights as they are then comes into force: a soft penalty, added to the loss whatever
    the training step does, draws the weights of the channels that would leave towards zero. Before epoch
    ``start_epoch`` they are removed, and training goes on.

    Args:
        start_epoch: Number of epochs before the channels are removed, at least 1.
        agent: ``"sac"``, ``"ppo-clip"``, ``"ppo-kl"``, ``"ppo-cim"``, ``"ppo-cim-1"``, ``"ppo-cim-2"``,
            ``"reinforce"`` or ``"random"``, or the import path of your own; see `make_agent`.
        warmup_epochs: Number of epochs of plain training at first, below ``start_epoch``.
        search_epochs: Number of epochs with episodes after that; the choice then stays. Default: all up to the removal.
        episodes: Number of episodes in a round, at least 2.
        rounds: Number of rounds in each of them; the agent learns after each. Many in a single epoch are a search on
            weights that stay as they are.
        strength: Weight of the penalty. By itself, under SGD, it takes ``strength`` times the sum of the learning rates
            of all steps, over 1 - momentum, off each norm: short schedules need more than the default.
        squared: Whether the norms that make up the penalty are squared.
        finalists: How many of the best choices of an epoch are measured again in the next one.
        recalibrate_batches: Number of training batches from which the statistics of batch normalisation are estimated
            anew for each choice; 0 to keep those of the whole network.
        limit_batches: Number of validation batches to measure on, of samples drawn at random, the same ones each time;
            default all that validation runs on.
        within: What chooses the channels within a group: a criterion that needs no data.
        evaluate: Given the LightningModule and a batch, returns loss and accuracy (any score; higher is better) as
            means over its examples; in YAML the import path of a function.
        seed: Seed of the agent.
        search_settings: As for `PolicySearch`: ``agent_updates``, ``environment_updates``, ``environment_size``,
            ``rewarded``, ``agent_settings``.
        settings: As for `PruningCallback`, without ``criterion``, ``steps`` and ``every_n_epochs``.

    Raises:
        ValueError: As `PruningCallback`; when training starts also if there is no validation split, or its batches
            are not ``(inputs, labels)`` of a classifier and ``evaluate`` is not given.

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

    cap = 0.8

    def __init__(
        self,
        start_epoch: int = 20,
        agent: str = "sac",
        warmup_epochs: int = 1,
        search_epochs: int | None = None,
        episodes: int = 10,
        rounds: int = 1,
        strength: float = 5e-5,
        squared: bool = False,
        finalists: int = 5,
        recalibrate_batches: int = 10,
        limit_batches: int | None = None,
        within: str | dict[str, Any] = "l1",
        evaluate: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
        search_settings: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(start_epoch=start_epoch, criterion=within, **settings)
        if self.steps != 1:
            raise ValueError(f"RLJointPruneCallback removes all channels at once; leave steps at 1, not {self.steps}.")
        if self.metric == "latency":
            raise ValueError("RLJointPruneCallback needs a metric that can be counted: flops, params or channels.")
        if not 0 <= warmup_epochs < start_epoch:
            raise ValueError(f"warmup_epochs must be below start_epoch={start_epoch}; got {warmup_epochs!r}.")
        if rounds < 1:
            raise ValueError(f"rounds must be a whole number of at least 1; got {rounds!r}.")
        if strength < 0 or finalists < 0 or recalibrate_batches < 0:
            raise ValueError("strength, finalists and recalibrate_batches must be at least 0.")
        if limit_batches is not None and limit_batches < 1:
            raise ValueError(f"limit_batches must be a whole number of at least 1, or None; got {limit_batches!r}.")
        self.agent, self.episodes, self.rounds, self.seed = agent, episodes, rounds, seed
        self.search_settings = {"environment_size": 128, **(search_settings or {})}
        self._make_search(steps=1)  # refuses wrong settings
        self.warmup_epochs, self.search_epochs = warmup_epochs, search_epochs
        self.strength, self.squared = strength, squared
        self.finalists, self.recalibrate_batches, self.limit_batches = finalists, recalibrate_batches, limit_batches
        self.evaluate = evaluate or classification
        self.search_state: dict[str, Any] | None = None
        self.searched_epoch = -1
        self.best: list[list[int]] = []  # widths that earned most in the last round
        self.in_force: dict[str, list[int]] = {}  # channels that stay, by group
        self.figures: dict[str, float] = {}
        self._search: PolicySearch | None = None
        self._alignment: Alignment | None = None
        self._recalibration: list[Any] = []

    def searches(self, epoch: int) -> bool:
        """Tell whether the agent plays episodes before an epoch."""
        end = self.start_epoch if self.search_epochs is None else self.warmup_epochs + self.search_epochs
        return self.warmup_epochs <= epoch < min(end, self.start_epoch)

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().prepare(trainer, pl_module)
        if self.steps_done == self.steps:
            return
        assert self._graph is not None
        if trainer.current_epoch >= self.start_epoch and self.searched_epoch < 0 < len(self._ahead()):
            raise ValueError(
                f"RLJointPruneCallback has nothing to choose from: the run goes on at epoch {trainer.current_epoch}, "
                f"from a checkpoint without its episodes, which come before start_epoch={self.start_epoch}. Raise "
                "start_epoch."
            )
        self._search = self._make_search(len(self._graph.groups))
        if self.search_state is not None:
            self._search.load_state_dict(self.search_state)
        self._recalibration = training_batches(trainer, self.recalibrate_batches, self.seed)
        self._measure(trainer, [PruningPlan()], limit=1)  # refuses now what would fail later

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().begin_epoch(trainer, pl_module)
        epoch = trainer.current_epoch
        trying = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.steps_done < self.steps and (trying or self.searches(epoch)) and self.searched_epoch < epoch:
            with trainer_state.unlogged(pl_module):
                for left in reversed(range(1 if trying else self.rounds)):
                    self._play_and_learn(trainer, left + self.rounds * len(self._ahead(epoch + 1)))
            self.searched_epoch = epoch
        self._align()
        for name, value in self.figures.items():
            trainer_state.log_epoch(pl_module, f"agent/{name}", value)

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not a term of the loss that backward runs through: here it holds whatever the training step returns, and the
        # gradients of distributed training, averaged by now, get what is the same on all ranks.
        if self._alignment is not None:
            accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._alignment.add_gradient(trainer_state.loss_scale(trainer) / accumulated)

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        """Choose what is removed: the best of the finalists and of the policy, on the weights as they are now."""
        assert self._search is not None
        search, problem = self._search, self._problem()
        widths = trainer_state.decided_by_first_rank(
            trainer, lambda: _rows(search.settle(problem, trainer.current_epoch), self.best)
        )
        plans = [problem.plan(each) for each in widths]
        self._chosen = plans[int(self._measure(trainer, plans).argmax())]
        return problem.scores

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        return self._chosen

    @override
    def _prune(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        super()._prune(trainer, pl_module, step)
        self._forget()
        self._search = self._alignment = None
        self._recalibration = []

    # -- checkpoint ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        search = self.search_state if self._search is None else self._search.state_dict()
        return {
            **super().state_dict(), "search": search, "searched_epoch": self.searched_epoch, "best": self.best,
            "in_force": self.in_force, "figures": self.figures,
        }  # fmt: skip

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.search_state, self.searched_epoch = state_dict["search"], state_dict["searched_epoch"]
        self.best, self.in_force, self.figures = state_dict["best"], state_dict["in_force"], state_dict["figures"]

    @override
    def __getstate__(self) -> dict[str, Any]:
        search = self.search_state if self._search is None else self._search.state_dict()
        left_out: dict[str, Any] = {"_search": None, "_alignment": None, "_recalibration": []}
        return {**super().__getstate__(), **left_out, "search_state": search}

    @override
    def _start_anew(self) -> None:
        super()._start_anew()
        self._forget()

    @override
    def _let_go(self) -> None:
        if self._search is not None:
            self.search_state = self._search.state_dict()
        super()._let_go()
        self._search = self._alignment = None
        self._recalibration = []

    # -- one round of episodes -------------------------------------------------------------------------------------

    def _play_and_learn(self, trainer: "pl.Trainer", left: int) -> None:
        """Play one round; `left` are to come after it."""
        assert self._search is not None
        search, problem, epoch, start = self._search, self._problem(), trainer.current_epoch, time.monotonic()
        widths = trainer_state.decided_by_first_rank(
            trainer, lambda: _rows(search.explore(problem, epoch), search.settle(problem, epoch), self.best)
        )
        plans = [problem.plan(each) for each in widths]
        with progress(f"Episodes before epoch {epoch}"):
            rewards = self._measure(trainer, plans)
        explored = rewards[: search.episodes]
        losses = trainer_state.decided_by_first_rank(trainer, lambda: search.learn(explored))
        order = rewards.argsort(descending=True, stable=True).tolist()
        # The one in force is always among those that are measured again.
        self.best = _distinct(widths[order].tolist())[: max(1, self.finalists)]
        self.in_force = {name: list(group.kept) for name, group in plans[order[0]].groups.items()}
        self.figures = {"reward": float(explored.mean()), "best_reward": float(rewards.max()), **losses}
        say(
            f"Episodes before epoch {epoch}: reward {explored.mean():.4f} on average, {rewards.max():.4f} in force; "
            f"{left} rounds left, {left * (time.monotonic() - start):.0f} s"
        )

    def _ahead(self, first: int = 0) -> list[int]:
        """Return the epochs that have episodes before them."""
        return [epoch for epoch in range(first, self.start_epoch) if self.searches(epoch)]

    def _align(self) -> None:
        """Draw weights towards what is in force."""
        if self.steps_done == self.steps or not self.in_force:
            return
        assert self._graph is not None
        plan = self._graph.plan({name: torch.tensor(kept) for name, kept in self.in_force.items()})
        self._alignment = Alignment(self._graph, plan, self.strength, self.squared)
        self.figures["alignment"] = self._alignment.penalty()

    def _measure(self, trainer: "pl.Trainer", plans: list[PruningPlan], limit: int | None = None) -> Tensor:
        assert self._graph is not None
        batches = ValidationBatches(trainer, limit or self.limit_batches, type(self).__name__)
        settings = {"evaluate": self.evaluate, "recalibrate": self._recalibration, "own_data": True}
        return accuracy_of(self._graph, batches, **settings)(plans)

    def _problem(self) -> PruningProblem:
        assert self._graph is not None
        return PruningProblem(
            self._graph, keep=self.keep, metric=self.metric, criterion=self.criterion,
            round_to=int(self.round_to), min_channels=self.min_channels, cap=self.cap,
        )  # fmt: skip

    def _make_search(self, steps: int) -> PolicySearch:
        return PolicySearch(
            self.agent, steps=steps, episodes=self.episodes, epochs=self.start_epoch + 1, seed=self.seed,
            **self.search_settings,
        )  # fmt: skip

    def _forget(self) -> None:
        """Drop what is known of a network whose channels are yet to be chosen."""
        self.search_state, self.searched_epoch = None, -1
        self.best, self.in_force, self.figures = [], {}, {}


def _rows(*widths: Any) -> np.ndarray:
    """Join choices of widths, none among them."""
    return np.concatenate([np.asarray(each, dtype=np.int64) for each in widths if len(each)])


def _distinct(rows: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]
