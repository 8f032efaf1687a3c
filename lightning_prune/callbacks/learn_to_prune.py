"""Learning to prune: layer after layer, agents try out which filters the network can do without."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.batches import ValidationBatches, check_limit, training_batches
from lightning_prune.callbacks.monitoring import check_candidates, check_measure, measure_in
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.trainer_state import log_epoch
from lightning_prune.callbacks.trial_run import is_trial
from lightning_prune.candidates import Memory
from lightning_prune.candidates.finite import refuse_not_finite
from lightning_prune.candidates.isolation import without_other_ranks
from lightning_prune.candidates.measures import samples_in
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning import CostModel, metric_named
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.reporting.loggers import say
from lightning_prune.search.filter_agent import FilterSearch, make_filter_agent
from lightning_prune.search.pruning_problem import accuracy_of
from lightning_prune.search.width_bounds import WidthBounds
from lightning_prune.surgery import prune

__all__ = ["LearnToPruneCallback", "reward"]

MOMENTUM = 0.9  # of the training steps that copies get


def reward(accuracy: Tensor, before: float, accepted_drop: float, channels: int, kept: Tensor) -> Tensor:
    """Return what choices of filters earn.

    Args:
        accuracy: (n,) accuracy with each choice, from 0 to 1.
        before: Accuracy of the network before, from 0 to 1.
        accepted_drop: The drop at which nothing is earned, in points of accuracy (hundredths).
        channels: Number of channels.
        kept: (n,) number of channels that are kept.

    Note:
        The product of Huang et al. (WACV 2018): one factor says how much of the accepted drop is not used up, the
        other is the logarithm of how many times fewer channels there are.

    Example:
        >>> reward(torch.tensor([0.89, 0.86]), before=0.9, accepted_drop=2.0, channels=8, kept=torch.tensor([4, 4]))
        tensor([ 0.3466, -0.6931])
    """
    drop = 100 * (before - accuracy)
    return (accepted_drop - drop) / accepted_drop * (channels / kept).log()


class LearnToPruneCallback(PruningCallback):
    """Prune one layer after the other, from the input to the output; an agent for each learns which filters to keep.

    At a prune the agent of the layer sees its filters, draws some choices of those to keep, each choice is tried out on
    the validation split, and the agent learns from what it has earned: much for few filters and a small drop of the
    accuracy. The network itself does not change until the agent has learned; then the layer is pruned, and training
    goes on until it is the next one's turn. The budget bounds the choices: an agent that would keep so much that
    the layers behind it cannot make up for it does without the least probable filters, one that would prune more than
    is asked in all keeps the most probable ones.

    Args:
        start_epoch: Number of epochs to train before the first prune, at least 0.
        steps: Number of prunes that the layers are dealt out to, in order; with as many as there are channel groups,
            or more, each has its own.
        accepted_drop: The drop of accuracy at which a choice earns nothing, in points (hundredths). If it is so small
            that the first layers keep nearly all, the last ones have to make up for it.
        samples: Number of choices that an agent learns from at once, at least 2.
        updates: Number of times that it learns.
        finetune_steps: Training steps that a copy of the network gets after a choice, before it is measured; 0 to
            compensate it instead.
        finetune_lr: Learning rate of these steps, of gradient descent with a momentum of 0.9.
        compensate_candidates: How each choice that is not fine-tuned is compensated before it is measured, whatever
            ``compensate`` says of the prune: ``"none"``, ``"statistics"``, ``"fold"`` or ``"refit"``.
        candidate_batches: Number of training batches to fine-tune or to compensate on.
        limit_batches: Number of validation batches to measure on, of samples drawn at random, the same ones each time;
            default all that validation runs on.
        evaluate: Given the LightningModule and a batch, returns loss and accuracy (from 0 to 1) as means over its
            samples, the loss with gradients where they are enabled; in YAML the import path of a function.
        monitor: Name of a metric that the module's own ``validation_step`` logs, to be measured in place of accuracy;
            the mean over batches counts.
        mode: ``"max"`` if much of that metric is good, ``"min"`` if little is.
        seed: Seed of the agents.
        agent_settings: As for `make_filter_agent`: ``keep``, ``baseline``, ``learning_rate``.
        compensate: As for `PruningCallback`; the method itself knows of none.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`; when training starts also if there is no validation split, or its batches
            are not ``(inputs, labels)`` of a classifier and neither ``evaluate`` nor ``monitor`` is given.

    Note:
        Huang et al., "Learning to Prune Filters in Convolutional Neural Networks" (WACV 2018), known from its abstract
        and reimplementations. Interpretation: a channel group stands for a layer and is seen by the filters that
        first make it, standardised; accuracies are compared with that of the network as it is when it is the
        layer's turn; an agent learns a fixed number of times; and the paper has no budget, only the accepted drop.

    Example:
        >>> callback = LearnToPruneCallback(keep=0.6, steps=13, every_n_epochs=2, accepted_drop=1.0)
        >>> callback.last_prune_epoch
        25
    """

    @dataclass
    class State(PruningCallback.State):
        """What has to survive a checkpoint.

        Attributes:
            figures: What is logged of the agent that learned last, by name.
        """

        figures: dict[str, float] = field(default_factory=dict)

    @dataclass
    class Run(PruningCallback.Run):
        """What exists while training goes on.

        Attributes:
            training: Batches to fine-tune copies or to compensate choices on.
            memory: What was collected to compensate choices, for as long as the weights are the same.
            validation: Batches to measure on; made once for all measurements of a prune, which share its workers.
        """

        training: list[Any] = field(default_factory=list)
        memory: Memory = field(default_factory=Memory)
        validation: ValidationBatches = field(init=False)

    cap = 0.8
    can_stop = False

    rankings = ("global",)

    state: State
    run: Run

    def __init__(
        self,
        start_epoch: int = 1,
        steps: int = 1,
        accepted_drop: float = 2.0,
        samples: int = 5,
        updates: int = 100,
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        compensate_candidates: str = "statistics",
        candidate_batches: int = 10,
        limit_batches: int | None = None,
        evaluate: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        monitor: str | None = None,
        mode: str = "max",
        seed: int = 0,
        agent_settings: Mapping[str, Any] | None = None,
        compensate: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(start_epoch=start_epoch, steps=steps, criterion="l1", compensate=compensate, **settings)
        if not metric_named(self.metric).counted:
            raise ValueError("LearnToPruneCallback needs a metric that can be counted: flops, params or channels.")
        if accepted_drop <= 0:
            raise ValueError(f"accepted_drop must be above 0, in points of accuracy; got {accepted_drop!r}.")
        if finetune_steps > 0 and candidate_batches < 1:
            raise ValueError("finetune_steps needs batches to train on: raise candidate_batches to 1 or more.")
        if finetune_steps > 0 and monitor is not None:
            raise ValueError("finetune_steps needs a loss to train copies on: give evaluate in place of monitor.")
        if updates < 0 or finetune_steps < 0:
            raise ValueError("updates and finetune_steps must be at least 0.")
        check_candidates(compensate_candidates, candidate_batches)
        check_limit(limit_batches)
        check_measure(evaluate, monitor, mode)
        self.accepted_drop = accepted_drop
        self.samples = samples
        self.updates = updates
        self.finetune_steps = finetune_steps
        self.finetune_lr = finetune_lr
        self.compensate_candidates = compensate_candidates
        self.candidate_batches = candidate_batches
        self.limit_batches = limit_batches
        self.evaluate = evaluate
        self.monitor = monitor
        self.mode = mode
        self.seed = seed
        self.agent_settings = dict(agent_settings or {})
        make_filter_agent(torch.eye(2), seed, samples, **self.agent_settings)  # refuses wrong settings

    def layers(self, names: list[str], done: int, step: int) -> list[str]:
        """Return the groups whose turn it is.

        Args:
            names: All groups, in order.
            done: Number of prunes that have been made.
            step: Number of the prune that is due.
        """
        first, end = (-(-len(names) * number // self.steps) for number in (done, step))  # rounded up
        return names[first:end]

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def prepare(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        if self.steps_done < self.steps:
            self.run.training = training_batches(trainer, self.candidate_batches, self.seed)
            self.run.validation = ValidationBatches(trainer, 1, type(self).__name__)
            self.run.evaluate = measure_in(self)
            self.measure([PruningPlan()])  # refuses now what would fail later
            del self.run.validation

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for name, value in self.state.figures.items():
            log_epoch(pl_module, f"agent/{name}", value)

    # -- what to prune ---------------------------------------------------------------------------------------------

    @override
    def make_plan(
        self, trainer: "pl.Trainer", graph: ChannelGraph, keep: float
    ) -> tuple[PruningPlan, dict[str, Tensor]]:
        """Let the agents of the layers whose turn it is decide."""
        cost = CostModel(graph, self.metric)
        bounds = WidthBounds(graph, cost, self.keep, int(self.round_to), self.min_channels, self.cap)
        self.run.validation = ValidationBatches(trainer, self.limit_batches, type(self).__name__)
        names = list(graph.groups)
        now = graph.snapshot({})
        widths = np.array([len(now.kept(name)) for name in names])  # (groups,)
        kept: dict[str, Tensor] = {}
        for name in self.layers(names, self.steps_done, self.run.step):
            search = FilterSearch(graph, name, bounds, widths, self.seed, samples=self.samples, **self.agent_settings)
            kept[name] = self.decide(search, name, kept)
            widths[names.index(name)] = len(kept[name])
        del self.run.validation
        plan = replace(graph.plan(kept), budget=bounds.report(widths))
        if self.run.step == self.steps:
            bounds.tell(plan)
        return plan, self.scores(trainer, graph)

    def decide(self, search: FilterSearch, name: str, kept: dict[str, Tensor]) -> Tensor:
        """Let the agent of a group learn, and return the channels of the group to keep.

        Args:
            search: The agent of the group.
            name: The group.
            kept: The channels to keep of the groups that were decided on just before.
        """
        trainer, graph = self.run.trainer, self.run.graph
        channels_before = len(search.channels)
        accuracy_before = float(self.measure([graph.plan(kept)])[0])
        updates = 1 if is_trial(trainer) else self.updates
        with progress(name, updates) as work:
            for _ in range(updates):
                drawn, choices = decided_by_first_rank(trainer, lambda: search.draw(self.samples))
                accuracy = self.measure([graph.plan({**kept, name: channels}) for channels in choices])
                counts = torch.tensor([len(channels) for channels in choices])
                earned = reward(accuracy, accuracy_before, self.accepted_drop, channels_before, counts)
                self.state.figures = {"reward": float(earned.mean()), **search.learn(drawn, earned)}
                work.advance(note=f"reward {self.state.figures['reward']:.3f}")
        _, (best,) = decided_by_first_rank(trainer, lambda: search.draw(1, greedy=True))
        figures = ", ".join(f"{figure} {value:.3f}" for figure, value in self.state.figures.items())
        least, most = search.limits
        say(
            f"{name}: {len(best)} of {channels_before} channels are kept (between {least} and {most} are allowed); "
            f"{figures}"
        )
        return best

    # -- measuring -------------------------------------------------------------------------------------------------

    def measure(self, plans: list[PruningPlan]) -> Tensor:
        """Return the accuracy on the validation split with each plan: (plans,), the same on every rank."""
        if not self.finetune_steps:
            measure = accuracy_of(
                self.run.graph,
                self.run.validation,
                evaluate=self.run.evaluate,
                compensate=self.compensate_candidates,
                compensate_batches=self.run.training,
                memory=self.run.memory,
                own_data=True,
            )
            return measure(plans)
        strategy = self.run.trainer.strategy
        accuracy = torch.tensor([self._finetuned(plan) for plan in plans], device=strategy.root_device)
        mean = strategy.reduce(accuracy, reduce_op="mean").cpu()
        refuse_not_finite(self.run.graph.model, self.run.validation, mean, mean)
        return mean

    def _finetuned(self, plan: PruningPlan) -> float:
        """Return the accuracy of a copy that has been pruned and trained for some steps."""
        model = self._copy(self.run.graph.model)
        prune(model, plan)
        without_other_ranks(model)
        self._train(model)
        model.eval()
        total, samples = 0.0, 0
        with torch.no_grad():
            for batch in self.run.validation:
                _, accuracy = self.run.evaluate(model, batch)
                total += float(accuracy) * samples_in(batch)
                samples += samples_in(batch)
        return total / samples

    def _train(self, model: nn.Module) -> None:
        """Train a copy for some steps."""
        optimizer = torch.optim.SGD(model.parameters(), self.finetune_lr, momentum=MOMENTUM)
        batches = self.run.training
        model.train()
        with isolate_rng():
            torch.manual_seed(self.seed)
            for step in range(self.finetune_steps):
                optimizer.zero_grad()
                loss, _ = self.run.evaluate(model, batches[step % len(batches)])
                loss.backward()
                optimizer.step()

    def _copy(self, model: nn.Module) -> nn.Module:
        try:
            return copy.deepcopy(model)
        except (TypeError, RuntimeError) as error:  # of locks, open files and the like; of tensors within a graph
            raise ValueError(
                f"finetune_steps={self.finetune_steps} trains copies of {type(model).__name__}, which cannot be "
                f"copied: {error}; set finetune_steps=0, or keep that object out of the module."
            ) from error
