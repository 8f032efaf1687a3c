"""The Taylor criterion in training: a first-order estimate of the loss, collected in the training steps themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.rehearsal import Backward, Rehearsal
from lightning_prune.callbacks.relatives import may_thaw, thaw, thaws_by_itself
from lightning_prune.callbacks.state import per_rank, under
from lightning_prune.callbacks.trainer_state import loss_scale
from lightning_prune.callbacks.trial_run import is_trial
from lightning_prune.criteria.channel_scores import refuse_blocks
from lightning_prune.criteria.first_order import check_settings, finish, is_normalized, why_unseen
from lightning_prune.criteria.first_order_sums import GRADIENT_FORMS, Collector, Totals, make_collector
from lightning_prune.criteria.registry import score
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.reporting.loggers import say

__all__ = ["TaylorRankCallback"]


_REMEDY = (
    "the training step does not run the layers that these channels are inputs of, or they are frozen in the epoch "
    "before the prune, or frozen and variant='gate'. Add them to ignore, raise start_epoch, or use PruningCallback."
)
_STEPS = ("steps", "loss", "gradients")  # what is counted of them


def _joined(saved: list[dict[str, dict[str, Tensor]]]) -> Totals:
    """Add up what several ranks have saved."""
    totals = Totals()
    for content in saved:
        totals.join(Totals(**content))
    return totals


class TaylorRankCallback(PruningCallback):
    """Prune by the first-order Taylor criterion, several steps with training in between.

    The score of a channel says how much the loss changes, to first order, when the channel is set to zero wherever it
    is an input. It is collected during the epoch before each prune, from the activations and gradients that training
    computes anyway. Ranks, gradient accumulation and mixed precision make no difference to it; steps with gradients
    that are not finite do not count.

    Args:
        start_epoch: Number of epochs to train before the first prune, at least 1, since scoring takes an epoch.
        variant: ``"a"`` (mean over samples of the absolute effect), ``"b"``, ``"c"``, ``"gate"``,
            ``"sum_then_square"`` or ``"square_then_sum"``; see `lightning_prune.criteria.taylor`.
        normalize: Divide the scores of each group by their Euclidean norm; default, as the sources do, for ``"a"``,
            ``"b"`` and ``"c"`` only.
        flops_penalty: How much of the cost of a channel, as a fraction of that of one channel of each group, is
            subtracted from its score.
        momentum: How much of the scores of the last prune is kept in the new ones, in [0, 1).
        compensate: As for `PruningCallback`; the method itself knows of none.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`; also if ``start_epoch`` is 0 or a setting is out of range.

    Note:
        The criterion is that of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017): absolute value of activation times gradient, averaged over the positions of a feature
        map within a sample, then over samples, and normalised by the L2 norm of the layer. Gate, weight forms and
        momentum are those of Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).
        Interpretation: where a channel is an input of several layers (residual streams), their contributions are
        added before the absolute value is taken, since pruning the channel takes it away from all of them; a channel
        group stands for a layer; and scores are means over the epoch, while the network learns.

    Example:
        >>> callback = TaylorRankCallback(keep=0.5, start_epoch=2, steps=4)
        >>> callback.steps_due(3)
        2
    """

    @dataclass
    class State(PruningCallback.State):
        """What has to survive a checkpoint.

        Attributes:
            totals: What this rank has collected since the last prune; each rank has seen its own data.
            listened: Whether anything of an epoch has been collected since the last prune.
            last_scores: The scores of the last prune, for ``momentum``.
        """

        totals: Totals = field(
            default_factory=Totals, metadata={**per_rank(vars, _joined), **under("variant", "ignore")}
        )
        last_scores: dict[str, Tensor] = field(
            default_factory=dict, metadata=under("variant", "normalize", "flops_penalty", "ignore")
        )
        listened: bool = field(default=False, metadata=under("variant", "ignore"))

        @classmethod
        @override
        def upgraded(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
            if "totals" in content or "sums" not in content:
                return content
            # Earlier versions saved what the first rank had collected, without a name around it.
            return {**content, "totals": [{name: content[name] for name in ("sums", "counts")}]}

    @dataclass
    class Run(PruningCallback.Run):
        """What exists while training goes on.

        Attributes:
            collector: What collects in the steps of this epoch, if a prune follows it.
        """

        collector: Collector | None = None

        @override
        def end(self) -> None:
            if self.collector is not None:
                self.collector.stop()
                self.collector = None

    state: State
    run: Run

    def __init__(
        self,
        start_epoch: int = 1,
        variant: str = "a",
        normalize: bool | None = None,
        flops_penalty: float = 0.0,
        momentum: float = 0.0,
        compensate: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(start_epoch=start_epoch, criterion="taylor", compensate=compensate, **settings)
        if start_epoch < 1:
            raise ValueError("start_epoch must be at least 1: the Taylor criterion scores during the epoch before.")
        check_settings(variant, flops_penalty)
        if self.blocks and is_normalized(variant, normalize):
            refuse_blocks(f"variant={variant!r} with normalize={normalize!r}")
        if not 0 <= momentum < 1:
            raise ValueError(
                f"momentum must be the fraction of the last scores that is kept, in [0, 1); got {momentum!r}."
            )
        self.variant = variant
        self.normalize = normalize
        self.flops_penalty = flops_penalty
        self.momentum = momentum

    def collecting(self, epoch: int) -> bool:
        """Tell whether channels are scored during an epoch, because a prune follows it."""
        return self.steps_due(epoch + 1) > self.steps_done

    # -- what to prune ---------------------------------------------------------------------------------------------

    @override
    def check_criterion(self) -> None:
        """Accept a criterion that needs data, which training collects."""

    @override
    def checked_blocks(self, blocks: bool, criterion: str | dict[str, Any]) -> bool:
        """Accept what the variant says whether it tells anything of blocks."""
        return blocks

    @override
    def ready(self) -> bool:
        return self.state.listened

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        seen = graph.channels()
        totals = _sum_of_ranks(trainer, seen, self.state.totals)
        self.run.end()  # training may go on with a pruned network in the same epoch
        self.state.totals = Totals()
        self.state.listened = False
        unseen = totals.unseen(seen)
        not_finite = why_unseen(graph, totals) if unseen else ""
        if not_finite:
            raise RuntimeError(
                f"TaylorRankCallback has seen no finite gradients before epoch {trainer.current_epoch}: {not_finite}."
            )
        if unseen and is_trial(trainer) and may_thaw(trainer):
            say(
                "This trial run scores channels by their weights alone, as those of frozen parts have no gradients yet."
            )
            return score(graph, "l1")
        if unseen:
            raise RuntimeError(f"{_has_seen_none(unseen)} before epoch {trainer.current_epoch}: {_REMEDY}")
        scores = finish(graph, totals, self.variant, self.normalize, self.flops_penalty)
        if self.momentum and self.state.last_scores:
            last = self.state.last_scores
            scores = {name: self._mixed(last[name], new) if name in last else new for name, new in scores.items()}
        self.state.last_scores = scores if self.momentum else {}
        return scores

    def _mixed(self, last: Tensor, new: Tensor) -> Tensor:
        pruned = new.isinf()
        return torch.where(pruned, new, self.momentum * last + (1 - self.momentum) * new)

    # -- collecting ------------------------------------------------------------------------------------------------

    @override
    def prepare(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        graph = graph.channels()
        make_collector(graph, self.variant, self.state.totals)  # which refuses what it cannot watch
        if not self.is_complete and not thaws_by_itself(trainer):
            self._refuse_unseen(trainer, graph)

    def _refuse_unseen(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        """Raise a ValueError if a training step, tried out, leaves nothing to score a group by."""
        totals = Totals()
        module: Any = graph.model
        epoch = max(trainer.current_epoch, self.start_epoch - 1)
        rehearsal = Rehearsal(trainer, module, self.state.training_batch_like, epoch)

        def watch(twin: Any) -> Backward:
            thaw(trainer, twin, epoch)
            return self._listening(replace(graph, model=twin), totals)

        works = rehearsal.gradients(watch)
        unseen = [name for name in graph.groups if name not in totals.counts]
        if works and unseen:
            raise ValueError(f"{_has_seen_none(unseen)} in a training step that was tried out: {_REMEDY}")

    def _listening(self, graph: ChannelGraph, totals: Totals) -> Backward:
        """Return a backward pass that is collected, of a twin."""
        collector = make_collector(graph, self.variant, totals)
        collector.listen()
        tensors = named_tensors(graph.model)

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            collector.before_backward()
            loss.backward(*args, **kwargs)
            collector.after_backward(1.0)
            gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
            collector.before_step(gradients)
            collector.after_batch()

        return backward

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.run.end()
        if is_trial(trainer) or self.collecting(trainer.current_epoch):
            self.state.listened = True
            if self._counts_on(trainer):
                self.run.collector = make_collector(self.run.graph.channels(), self.variant, self.state.totals)
                self.run.collector.listen()

    def _counts_on(self, trainer: "pl.Trainer") -> bool:
        """Tell whether a rank collects: optimizers step with the gradients of all ranks, which count once.

        Otherwise a step would weigh as much as there are ranks, and a run that goes on with fewer would mix weights.
        """
        return self.variant not in GRADIENT_FORMS or trainer.is_global_zero

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if self.run.collector is not None:
            self.run.collector.totals.begin_step(loss)
            self.run.collector.before_backward()

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.run.collector is not None:
            # Lightning divides the loss of each batch by the number of batches that a step accumulates.
            accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.run.collector.after_backward(accumulated / loss_scale(trainer))

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if self.run.collector is None or self.variant not in GRADIENT_FORMS:
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        tensors = {name: tensor for name, tensor in named_tensors(pl_module).items() if id(tensor) in stepped}
        gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
        self.run.collector.before_step(gradients)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.run.collector is not None:
            self.run.collector.after_batch()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _has_seen_none(groups: Sequence[str]) -> str:
    return f"TaylorRankCallback has seen no gradients of {', '.join(map(repr, groups))}"


def _sum_of_ranks(trainer: "pl.Trainer", graph: ChannelGraph, totals: Totals) -> Totals:
    """Add up the totals of all ranks; groups that a rank knows nothing of count as none."""
    device = trainer.strategy.root_device
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    steps = [totals.steps.get(name, nothing).to(device).view(1) for name in _STEPS]
    rows = [torch.cat(steps)]  # and (channels + 1,) sums and count of each group
    for name in graph.groups:
        sums = totals.sums[name].to(device) if name in totals.sums else nothing.expand(len(graph.kept(name)))
        count = totals.counts.get(name, nothing).to(device)
        rows.append(torch.cat([sums, count.view(1)]))
    added = trainer.strategy.reduce(torch.cat(rows), reduce_op="sum")
    steps_of_all, *of_groups = added.split([len(row) for row in rows])
    by_group = dict(zip(graph.groups, of_groups, strict=True))
    sums_by_group = {name: row[:-1] for name, row in by_group.items()}
    counts_by_group = {name: row[-1] for name, row in by_group.items()}
    return Totals(sums_by_group, counts_by_group, dict(zip(_STEPS, steps_of_all, strict=True)))
