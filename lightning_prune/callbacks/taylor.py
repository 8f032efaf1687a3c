"""Rank channels by activation times gradient, collected in the training steps themselves."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.criteria.taylor import channel_effects, normalize_by_group
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.channel_graph import Group

__all__ = ["TaylorRankCallback"]


class TaylorRankCallback(PruningCallback):
    """Prune by the first-order Taylor criterion, several steps with training in between.

    The score of a channel is the mean over examples of the absolute change of the loss, to first order, when all that
    is read from the channel is set to zero. It is collected during the epoch before each prune, from the activations
    and gradients that training computes anyway, and divided by the Euclidean norm of the scores in its group.

    Args:
        start_epoch: Number of epochs to train before the first prune, at least 1, since ranking takes an epoch.
        settings: As for `PruningCallback`.

    Raises:
        ValueError: As `PruningCallback`; also if ``start_epoch`` is 0.

    Note:
        The criterion is that of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017): absolute value of activation times gradient, averaged over the positions of a feature
        map within an example, then over examples, and normalised by the L2 norm of the layer. Interpretation: where
        several layers read a channel (residual streams), their contributions are added before the absolute value is
        taken, since removing the channel takes it away from all of them; and a channel group stands for a layer.

    Example:
        >>> callback = TaylorRankCallback(keep=0.5, start_epoch=2, steps=4)
        >>> callback.steps_due(3)
        2
    """

    def __init__(self, start_epoch: int = 1, **settings: Any) -> None:
        super().__init__(start_epoch=start_epoch, **settings)
        if start_epoch < 1:
            raise ValueError("start_epoch must be at least 1: the Taylor criterion ranks during the epoch before.")
        self.sums: dict[str, Tensor] = {}
        self._taps: list[RemovableHandle] = []
        self.listened = False  # to a part of an epoch at least
        self._effects: dict[int, dict[str, Tensor]] = {}  # by number of examples, then by tensor that reads

    def collecting(self, epoch: int) -> bool:
        """Tell whether channels are ranked during an epoch, because a prune follows it."""
        return self.steps_due(epoch + 1) > self.steps_done

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        assert self._graph is not None
        _refuse_unreadable(self._graph)

    @override
    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().begin_epoch(trainer, pl_module)
        self._untap()
        if self.collecting(trainer.current_epoch):
            self._tap(pl_module)

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._effects:
            return
        assert self._graph is not None
        examples = sum(self._effects) * _loss_scale(trainer)
        means = {
            name: self._sum_over_examples(group, pl_module.device) / examples
            for name, group in self._graph.groups.items()
        }
        finite = torch.stack([mean.isfinite().all() for mean in means.values()]).all()
        for name, values in means.items():
            # A step with non-finite gradients is skipped by the optimizer too; no branch, to spare a synchronisation.
            mean = torch.where(finite, values, 0.0).double()
            self.sums[name] = self.sums[name].to(mean.device) + mean if name in self.sums else mean
        self._effects.clear()

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        if not self.sums:
            raise RuntimeError(
                f"TaylorRankCallback has seen no gradients of what is to be pruned before epoch "
                f"{trainer.current_epoch}: the training step does not run these layers, or nothing before them is "
                "trained. Use PruningCallback."
            )
        sums, device = {}, trainer.strategy.root_device
        for name, group in graph.groups.items():
            total = torch.zeros(group.size, dtype=torch.float64, device=device)
            if name in self.sums:
                total[graph.live(name).to(total.device)] = self.sums[name].to(total.device)
            sums[name] = trainer.strategy.reduce(total, reduce_op="sum")
        self.sums, self.listened = {}, False
        return normalize_by_group(graph, sums)

    @override
    def state_dict(self) -> dict[str, Any]:
        sums = {name: values.cpu() for name, values in self.sums.items()}
        return {**super().state_dict(), "sums": sums, "listened": self.listened}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.sums, self.listened = dict(state_dict["sums"]), state_dict["listened"]

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_taps": [], "_effects": {}}

    # -- collecting ------------------------------------------------------------------------------------------------

    @override
    def ready(self) -> bool:
        return self.listened

    def _tap(self, pl_module: "pl.LightningModule") -> None:
        assert self._graph is not None
        self._untap()
        self.listened = True
        modules = dict(pl_module.named_modules())
        readers = {part.tensor for group in self._graph.groups.values() for part in group.readers}
        for tensor in sorted(readers):
            reader = modules[tensor.rpartition(".")[0]]
            self._taps.append(reader.register_forward_pre_hook(partial(self._read, tensor)))

    def _read(self, tensor: str, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Let the gradient that flows back through one reader pass by."""
        activation = args[0]
        if not torch.is_grad_enabled() or not activation.requires_grad:
            return None
        tapped = activation.view_as(activation)  # a node of its own: the gradient through this reader alone
        axis = activation.dim() - 1 if isinstance(reader, nn.Linear) else 1
        tapped.register_hook(partial(self._collect, tensor, activation.detach(), axis))
        return (tapped, *args[1:])

    def _collect(self, tensor: str, activation: Tensor, axis: int, gradient: Tensor) -> None:
        effect = channel_effects(activation, gradient, axis).detach()
        effects = self._effects.setdefault(len(effect), {})
        effects[tensor] = effects[tensor] + effect if tensor in effects else effect

    def _sum_over_examples(self, group: Group, device: torch.device) -> Tensor:
        """Return the absolute effect of each live channel of a group, summed over examples: (channels,)."""
        assert self._graph is not None
        channels = self._graph.live(group.name)
        total = torch.zeros(len(channels), device=device)
        # Passes over equally many examples are passes over the same ones; others are examples of their own.
        for effects in self._effects.values():
            found = [
                effects[part.tensor][:, self._graph.positions_now(part, channels)]
                .unflatten(1, (len(channels), -1))
                .sum(2)
                for part in group.readers
                if part.tensor in effects
            ]
            if found:
                total = total + torch.stack(found).sum(0).abs().sum(0)
        return total

    def _untap(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps.clear()
        self._effects.clear()

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._untap()


def _loss_scale(trainer: "pl.Trainer") -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def _refuse_unreadable(graph: ChannelGraph) -> None:
    """Raise where channels are not read by convolutions or linear layers, whose inputs can be watched."""
    modules = dict(graph.model.named_modules())
    for name, group in graph.groups.items():
        for part in group.readers:
            module, _, attribute = part.tensor.rpartition(".")
            kind = modules[module]
            if attribute != "weight" or not isinstance(kind, nn.Linear | nn.modules.conv._ConvNd):
                raise ValueError(
                    f"The Taylor criterion cannot watch what {module or 'the model'!r} ({type(kind).__name__}) reads of "
                    f"group {name!r}; add {name!r} to ignore, or use PruningCallback."
                )
