"""Rank channels by a first-order estimate of the loss, collected in the training steps themselves."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks import trainer_state
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.criteria.first_order import check_settings, finish
from lightning_prune.criteria.first_order_sums import GRADIENT_FORMS, Collector, Totals, make_collector
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors

__all__ = ["TaylorRankCallback"]


class TaylorRankCallback(PruningCallback):
    """Prune by the first-order Taylor criterion, several steps with training in between.

    The score of a channel says how much the loss changes, to first order, when all that is read from the channel is set
    to zero. It is collected during the epoch before each prune, from the activations and gradients that training
    computes anyway. Ranks, gradient accumulation and mixed precision make no difference to it; steps with gradients
    that are not finite are left out.

    Args:
        start_epoch: Number of epochs to train before the first prune, at least 1, since ranking takes an epoch.
        variant: ``"a"`` (mean over examples of the absolute effect), ``"b"``, ``"c"``, ``"gate"``,
            ``"sum_then_square"`` or ``"square_then_sum"``; see `lightning_prune.criteria.taylor`.
        normalize: Divide the scores of each group by their Euclidean norm; default, as the sources do, for ``"a"``,
            ``"b"`` and ``"c"`` only.
        flops_penalty: How much of the cost of a channel, as part of that of one channel of each group, is subtracted
            from its score.
        momentum: How much of the scores of the last prune stays in the new ones, in [0, 1).
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`; also if ``start_epoch`` is 0 or a setting is out of range.

    Note:
        The criterion is that of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017): absolute value of activation times gradient, averaged over the positions of a feature
        map within an example, then over examples, and normalised by the L2 norm of the layer. Gate, weight forms and
        momentum are those of Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).
        Interpretation: where several layers read a channel (residual streams), their contributions are added before
        the absolute value is taken, since removing the channel takes it away from all of them; a channel group stands
        for a layer; and scores are means over the epoch, while the network learns.

    Example:
        >>> callback = TaylorRankCallback(keep=0.5, start_epoch=2, steps=4)
        >>> callback.steps_due(3)
        2
    """

    def __init__(
        self,
        start_epoch: int = 1,
        variant: str = "a",
        normalize: bool | None = None,
        flops_penalty: float = 0.0,
        momentum: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(start_epoch=start_epoch, criterion="taylor", **settings)
        if start_epoch < 1:
            raise ValueError("start_epoch must be at least 1: the Taylor criterion ranks during the epoch before.")
        check_settings(variant, flops_penalty)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be the part of the last scores that stays, in [0, 1); got {momentum!r}.")
        self.variant = variant
        self.normalize = normalize
        self.flops_penalty = flops_penalty
        self.momentum = momentum
        self.totals = Totals()
        self.listened = False  # to a part of an epoch at least
        self.last_scores: dict[str, Tensor] = {}
        self._collector: Collector | None = None

    @override
    def check_criterion(self) -> None:
        """Accept a criterion that needs data, which training collects."""

    def collecting(self, epoch: int) -> bool:
        """Tell whether channels are ranked during an epoch, because a prune follows it."""
        return self.steps_due(epoch + 1) > self.steps_done

    @override
    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().prepare(trainer, pl_module)
        assert self._graph is not None
        make_collector(self._graph, self.variant, self.totals)  # which refuses what it cannot watch

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().begin_epoch(trainer, pl_module)
        self._stop_listening()
        if trainer.fast_dev_run or self.collecting(trainer.current_epoch):  # type: ignore[attr-defined]
            assert self._graph is not None
            self._collector = make_collector(self._graph, self.variant, self.totals)
            self._collector.listen()
            self.listened = True

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        if self._collector is not None:
            self._collector.before_backward()

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._collector is not None:
            # Lightning divides the loss of each batch by the number of batches that a step accumulates.
            accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._collector.after_backward(accumulated / trainer_state.loss_scale(trainer))

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if self._collector is not None and self.variant in GRADIENT_FORMS:
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            tensors = {name: tensor for name, tensor in named_tensors(pl_module).items() if id(tensor) in own}
            self._collector.before_step({name: t.grad for name, t in tensors.items() if t.grad is not None})

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._collector is not None:
            self._collector.after_batch()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        totals = _sum_of_ranks(trainer, graph, self.totals)
        unseen = totals.unseen(graph)
        if unseen:
            raise RuntimeError(
                f"TaylorRankCallback has seen no gradients of {', '.join(map(repr, unseen))} before epoch "
                f"{trainer.current_epoch}: the training step does not run what reads these channels, or it is frozen "
                "and variant='gate'. Add them to ignore, or use PruningCallback."
            )
        self._stop_listening()  # training may go on with a pruned network in the same epoch
        self.totals, self.listened = Totals(), False
        found = finish(graph, totals, self.variant, self.normalize, self.flops_penalty)
        if self.momentum and self.last_scores:
            found = {name: self._mixed(self.last_scores[name], values) for name, values in found.items()}
        self.last_scores = found if self.momentum else {}
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        totals = {"sums": _on_cpu(self.totals.sums), "counts": _on_cpu(self.totals.counts)}
        return {
            **super().state_dict(), "totals": [totals], "last_scores": _on_cpu(self.last_scores),
            "listened": self.listened,
        }  # fmt: skip

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.totals = Totals()
        if "totals" not in state_dict:  # as earlier versions saved them, those of the first rank alone
            state_dict = {**state_dict, "totals": [{name: state_dict[name] for name in ("sums", "counts")}]}
        for rank in state_dict["totals"]:
            self.totals.join(Totals(**rank))
        self.last_scores, self.listened = dict(state_dict["last_scores"]), state_dict["listened"]

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        # Each rank has seen a part of the data. After a failure the others may not be there to be asked.
        shared = distributed.is_available() and distributed.is_initialized() and not trainer.interrupted
        if shared and self.listened:
            state = checkpoint["callbacks"][self.state_key]
            everyone: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, state["totals"])
            state["totals"] = [totals for (totals,) in everyone]

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        # To each rank what was its own, or a share if there are more or fewer ranks now: in the end they are added up.
        state = checkpoint["callbacks"].get(self.state_key, {})
        if "totals" in state:
            state["totals"] = state["totals"][trainer.global_rank :: trainer.world_size]

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_collector": None}

    @override
    def ready(self) -> bool:
        return self.listened

    def _mixed(self, last: Tensor, new: Tensor) -> Tensor:
        gone = new.isinf()
        return torch.where(gone, new, self.momentum * last + (1 - self.momentum) * new)

    def _stop_listening(self) -> None:
        if self._collector is not None:
            self._collector.stop()
            self._collector = None

    @override
    def _start_anew(self) -> None:
        super()._start_anew()
        self.totals, self.listened, self.last_scores = Totals(), False, {}

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._stop_listening()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _sum_of_ranks(trainer: "pl.Trainer", graph: ChannelGraph, totals: Totals) -> Totals:
    """Add up the totals of all ranks; groups that a rank knows nothing of count as none."""
    device = trainer.strategy.root_device
    none = torch.zeros((), dtype=torch.float64, device=device)
    parts = []
    for name in graph.groups:
        live = len(graph.kept(name))
        sums = totals.sums[name].to(device) if name in totals.sums else none.expand(live)
        parts.append(torch.cat([sums, totals.counts.get(name, none).to(device).view(1)]))
    flat = trainer.strategy.reduce(torch.cat(parts), reduce_op="sum")
    split = flat.split([len(part) for part in parts])
    named = dict(zip(graph.groups, split, strict=True))
    return Totals({n: part[:-1] for n, part in named.items()}, {n: part[-1] for n, part in named.items()})
