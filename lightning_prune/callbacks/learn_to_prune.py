"""Prune layer after layer, by agents that try out which filters can go."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.search.filter_agent import FilterSearch, make_filter_agent
from lightning_prune.search.pruning_problem import accuracy_of
from lightning_prune.search.width_bounds import WidthBounds
from lightning_prune.planning.cost import CostModel
from lightning_prune.callbacks import trainer_state
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.batches import ValidationBatches, training_batches
from lightning_prune.candidates import classification
from lightning_prune.candidates.evaluator import alone
from lightning_prune.candidates.measures import examples_in
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.progress import progress
from lightning_prune.reporting.loggers import say
from lightning_prune.surgery import prune

__all__ = ["LearnToPruneCallback", "reward"]

MOMENTUM = 0.9  # of the training steps that copies get


def reward(accuracy: Tensor, before: float, accepted_drop: float, channels: int, kept: Tensor) -> Tensor:
    """Return what choices of filters earn.

    Args:
        accuracy: (n,) accuracy that is left, from 0 to 1.
        before: Accuracy of the network before, from 0 to 1.
        accepted_drop: The drop at which nothing is earned, in points of accuracy (hundredths).
        channels: Number of channels.
        kept: (n,) number of channels that stay.

    Note:
        The product of Huang et al. (WACV 2018): one factor says how much of the accepted drop is left, the other is the
        logarithm of how many times fewer channels there are.

    Example:
        >>> reward(torch.tensor([0.89, 0.86]), before=0.9, accepted_drop=2.0, channels=8, kept=torch.tensor([4, 4]))
        tensor([ 0.3466, -0.6931])
    """
    drop = 100 * (before - accuracy)
    return (accepted_drop - drop) / accepted_drop * (channels / kept).log()


class LearnToPruneCallback(PruningCallback):
    """Prune one layer after the other, from the input to the output; an agent for each learns which filters can go.

    At a prune the agent of the layer sees its filters, draws some choices of those that stay, each choice is tried out
    on the validation split, and the agent learns from what it has earned: much for few filters and a small drop of the
    accuracy. The network itself stays as it was until the agent has learned; then the layer is pruned, and training
    goes on until it is the next one's turn. The budget bounds the choices: an agent that would keep so much that
    the layers behind it cannot make up for it loses the least probable filters, one that would remove more than is
    asked in all keeps the most probable ones.

    Args:
        start_epoch: Number of epochs to train before the first prune, at least 0.
        steps: Number of prunes that the layers are dealt out to, in order; with as many as there are channel groups,
            or more, each has its own.
        accepted_drop: The drop of accuracy at which a choice earns nothing, in points (hundredths). If it is so small
            that the first layers keep nearly all, the last ones have to make up for it.
        samples: Number of choices that an agent learns from at once, at least 2.
        updates: How often it learns.
        finetune_steps: Training steps that a copy of the network gets after a choice, before it is measured; 0 to
            estimate the statistics of batch normalisation anew instead.
        finetune_lr: Learning rate of these steps, of gradient descent with a momentum of 0.9.
        recalibrate_batches: Number of training batches to fine-tune or to estimate the statistics on.
        limit_batches: Number of validation batches to measure on, of samples drawn at random, the same ones each time;
            default all that validation runs on.
        evaluate: Given the LightningModule and a batch, returns loss and accuracy (from 0 to 1) as means over its
            examples, the loss with gradients where they are enabled; in YAML the import path of a function.
        seed: Seed of the agents.
        agent_settings: As for `make_filter_agent`: ``keep``, ``baseline``, ``learning_rate``.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`; when training starts also if there is no validation split, or its batches
            are not ``(inputs, labels)`` of a classifier and ``evaluate`` is not given.

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

    cap = 0.8

    def __init__(
        self,
        start_epoch: int = 1,
        steps: int = 1,
        accepted_drop: float = 2.0,
        samples: int = 5,
        updates: int = 100,
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        recalibrate_batches: int = 10,
        limit_batches: int | None = None,
        evaluate: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
        agent_settings: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(start_epoch=start_epoch, steps=steps, criterion="l1", **settings)
        if self.metric == "latency":
            raise ValueError("LearnToPruneCallback needs a metric that can be counted: flops, params or channels.")
        if accepted_drop <= 0:
            raise ValueError(f"accepted_drop must be above 0, in points of accuracy; got {accepted_drop!r}.")
        if finetune_steps > 0 and recalibrate_batches < 1:
            raise ValueError("finetune_steps needs batches to train on: raise recalibrate_batches to 1 or more.")
        if updates < 0 or finetune_steps < 0 or recalibrate_batches < 0:
            raise ValueError("updates, finetune_steps and recalibrate_batches must be at least 0.")
        if limit_batches is not None and limit_batches < 1:
            raise ValueError(f"limit_batches must be a whole number of at least 1, or None; got {limit_batches!r}.")
        self.accepted_drop, self.samples, self.updates = accepted_drop, samples, updates
        self.finetune_steps, self.finetune_lr = finetune_steps, finetune_lr
        self.recalibrate_batches, self.limit_batches = recalibrate_batches, limit_batches
        self.evaluate = evaluate or classification
        self.seed, self.agent_settings = seed, dict(agent_settings or {})
        make_filter_agent(torch.eye(2), seed, samples, **self.agent_settings)  # refuses wrong settings
        self.figures: dict[str, float] = {}
        self._due: list[str] = []
        self._batches: list[Any] = []
        self._validation: ValidationBatches | None = None

    def layers(self, names: list[str], done: int, step: int) -> list[str]:
        """Return the groups whose turn it is.

        Args:
            names: All groups, in order.
            done: Number of prunes that have been made.
            step: Number of the prune that is due.
        """
        first, end = (-(-len(names) * number // self.steps) for number in (done, step))
        return names[first:end]

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().prepare(trainer, pl_module)
        if self.steps_done < self.steps:
            self._batches = training_batches(trainer, self.recalibrate_batches, self.seed)
            self._validation = ValidationBatches(trainer, 1, type(self).__name__)
            self._measure(trainer, [PruningPlan()])  # refuses now what would fail later
            self._validation = None

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().begin_epoch(trainer, pl_module)
        for name, value in self.figures.items():
            trainer_state.log_epoch(pl_module, f"agent/{name}", value)

    @override
    def _prune(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        assert self._graph is not None
        self._due = self.layers(list(self._graph.groups), self.steps_done, step)
        super()._prune(trainer, pl_module, step)

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        """Let the agents of the layers whose turn it is decide."""
        cost = CostModel(graph, self.metric)
        bounds = WidthBounds(graph, cost, self.keep, int(self.round_to), self.min_channels, self.cap)
        widths = np.array([len(graph.kept(name)) for name in graph.groups])
        # Made once for all measurements, which share the workers that load it.
        self._validation = ValidationBatches(trainer, self.limit_batches, type(self).__name__)
        kept: dict[str, Tensor] = {}
        for name in self._due:
            search = FilterSearch(graph, name, bounds, widths, self.seed, samples=self.samples, **self.agent_settings)
            kept[name] = self._decide(trainer, search, name, kept)
            widths[list(graph.groups).index(name)] = len(kept[name])
        self._validation = None
        made = graph.plan(kept)
        self._chosen = PruningPlan(made.groups, made.shapes, bounds.report(widths))
        return super().scores(trainer, graph)

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        return self._chosen

    # -- checkpoint ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "figures": self.figures}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.figures = state_dict["figures"]

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_batches": [], "_validation": None}

    @override
    def _start_anew(self) -> None:
        super()._start_anew()
        self.figures = {}

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._batches, self._validation = [], None

    # -- one layer -------------------------------------------------------------------------------------------------

    def _decide(self, trainer: "pl.Trainer", search: FilterSearch, name: str, kept: dict[str, Tensor]) -> Tensor:
        """Return the channels of a group that stay.

        Args:
            trainer: The trainer.
            search: The agent of the group.
            name: The group.
            kept: The channels that stay of the groups that were decided on just before.
        """
        assert self._graph is not None
        graph = self._graph
        before = float(self._measure(trainer, [graph.plan(kept)])[0])
        updates = 1 if trainer.fast_dev_run else self.updates  # type: ignore[attr-defined]
        with progress(name, updates) as work:
            for _ in range(updates):
                drawn, tried = trainer_state.decided_by_first_rank(trainer, lambda: search.draw(self.samples))
                accuracy = self._measure(trainer, [graph.plan({**kept, name: channels}) for channels in tried])
                counts = torch.tensor([len(channels) for channels in tried])
                earned = reward(accuracy, before, self.accepted_drop, len(search.live), counts)
                self.figures = {"reward": float(earned.mean()), **search.learn(drawn, earned)}
                work.advance(note=f"reward {self.figures['reward']:.3f}")
        _, (best,) = trainer_state.decided_by_first_rank(trainer, lambda: search.draw(1, explore=False))
        told = ", ".join(f"{figure} {value:.3f}" for figure, value in self.figures.items())
        least, most = search.limits
        say(f"{name}: {len(best)} of {len(search.live)} channels stay (between {least} and {most} are allowed); {told}")
        return best

    def _measure(self, trainer: "pl.Trainer", plans: list[PruningPlan]) -> Tensor:
        """Return the accuracy with each plan."""
        assert self._graph is not None
        assert self._validation is not None
        batches = self._validation
        if not self.finetune_steps:
            settings = {"evaluate": self.evaluate, "recalibrate": self._batches, "own_data": True}
            return accuracy_of(self._graph, batches, **settings)(plans)
        found = [self._finetuned(plan, batches) for plan in plans]
        return trainer.strategy.reduce(torch.tensor(found, device=trainer.strategy.root_device), reduce_op="mean").cpu()

    def _finetuned(self, plan: PruningPlan, batches: ValidationBatches) -> float:
        """Return the accuracy of a copy that has been pruned and trained for some steps."""
        assert self._graph is not None
        model = self._copy(self._graph.model)
        prune(model, plan)
        for module in model.modules():
            module.__dict__["forward"] = alone(module, module.forward)
        optimizer = torch.optim.SGD(model.parameters(), self.finetune_lr, momentum=MOMENTUM)
        model.train()
        with isolate_rng():
            torch.manual_seed(self.seed)
            for step in range(self.finetune_steps):
                optimizer.zero_grad()
                self.evaluate(model, self._batches[step % len(self._batches)])[0].backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            found = [(float(self.evaluate(model, batch)[1]), examples_in(batch)) for batch in batches]
        return sum(accuracy * count for accuracy, count in found) / sum(count for _, count in found)

    def _copy(self, model: nn.Module) -> nn.Module:
        try:
            return copy.deepcopy(model)
        except (TypeError, RuntimeError) as error:  # of locks, open files and the like; of tensors within a graph
            raise ValueError(
                f"finetune_steps={self.finetune_steps} trains copies of {type(model).__name__}, which cannot be "
                f"copied: {error}; set finetune_steps=0, or keep that object out of the module."
            ) from error
