"""Alignment: a soft regularization that draws the weights of channels to be pruned towards zero."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.masks import pruned_channels

__all__ = ["Alignment", "Pull"]

VANISHED = 0.05  # what is left of a norm when it counts as zero, where it falls by shares


@dataclass
class _Slices:
    """The slices of one parameter that belong to the pruned channels of one group.

    Attributes:
        parameter: The parameter.
        mask: 1 in these slices and 0 elsewhere, in the shape of the parameter.
    """

    parameter: nn.Parameter
    mask: Tensor


class Alignment:
    """Pull the weights of channels that a plan prunes towards zero, layer by layer.

    The penalty is the sum, over the out-channel and in-channel slices of the groups, of the Euclidean norm of all
    weights in them that would be pruned. Its gradient, times a strength, is added to that of the loss.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels to keep.
        squared: Whether norms are squared.

    Note:
        Ganjdanesh et al., "Jointly Training and Pruning CNNs via Learnable Agent Guidance and Alignment" (CVPR 2024):
        a group norm, not squared. That there is one norm for each layer and side is known from a reproduction only.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> model[0].weight.data, model[2].weight.data = torch.tensor([[1.0], [3.0], [4.0]]), torch.ones(1, 3)
        >>> graph = trace(model, torch.zeros(1, 1))
        >>> alignment = Alignment(graph, graph.plan({"0": torch.tensor([0])}))
        >>> alignment.penalty()  # 5 + sqrt(2)
        6.4142...
        >>> model[0].weight.grad = torch.zeros(3, 1)
        >>> alignment.add_gradient(0.1)
        >>> model[0].weight.grad.flatten()  # 0.1 / 5 times the weights that would be pruned
        tensor([0.0000, 0.0600, 0.0800])
    """

    def __init__(self, graph: ChannelGraph, plan: PruningPlan, squared: bool = False) -> None:
        self.squared = squared
        self._slices: list[_Slices] = []
        tensors = graph.tensors()
        for name, planned in plan.groups.items():
            channels = pruned_channels(graph, name, planned)
            if len(channels) == 0:
                continue
            group = graph.group(name)
            for slice_ in dict.fromkeys((*group.out_slices, *group.in_slices)):
                weight = tensors[slice_.tensor]
                if not isinstance(weight, nn.Parameter):
                    continue
                positions = graph.positions_now(slice_, channels).to(weight.device)
                mask = torch.zeros_like(weight, requires_grad=False)
                self._slices.append(_Slices(weight, mask.index_fill_(slice_.axis, positions, 1)))

    @torch.no_grad()
    def penalty(self) -> float:
        """Return the sum of the norms, or of their squares."""
        if not self._slices:
            return 0.0
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(self._masked_weights())])
        terms = norms.square() if self.squared else norms
        return float(terms.sum())

    @torch.no_grad()
    def to_vanish(self) -> float:
        """Return the sum over steps of learning rate times strength that is the end of all norms.

        Gradient descent takes learning rate times strength off each norm in each step, and twice that share of it where
        norms are squared in the penalty.
        """
        if not self._slices:
            return 0.0
        greatest = float(max(torch._foreach_norm(self._masked_weights())))
        return -math.log(VANISHED) / 2 if self.squared else greatest

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are drawn."""
        return list(dict.fromkeys(slices.parameter for slices in self._slices))

    @torch.no_grad()
    def add_gradient(self, strength: float) -> None:
        """Add the gradient of the penalty to the gradients that are there; parameters without one are passed over.

        Args:
            strength: What the penalty is multiplied by.
        """
        if not self._slices:
            return
        masked = self._masked_weights()
        for slices, weights, slope in zip(self._slices, masked, self._slopes(masked), strict=True):
            gradient = slices.parameter.grad
            if gradient is not None:
                gradient.add_(weights * slope, alpha=strength)

    def _masked_weights(self) -> list[Tensor]:
        """Return each parameter with zeros for all weights that would be kept."""
        weights = [slices.parameter.detach() for slices in self._slices]
        masks = [slices.mask for slices in self._slices]
        return list(torch._foreach_mul(weights, masks))

    def _slopes(self, masked: list[Tensor]) -> list[Tensor]:
        """Return what weights are multiplied by for the gradient of their norm; nothing where all are zero."""
        norms = torch._foreach_norm(masked)
        if self.squared:
            return [torch.full_like(norm, 2.0) for norm in norms]
        return [norm.reciprocal().masked_fill(norm == 0, 0.0) for norm in norms]


class Pull:
    """Tell how strong a penalty has to be for the norms to reach zero by the prune.

    The strength follows the schedule, whatever it is: in each step it is such that the optimizer takes as much off a
    norm, were there no other gradients.

    Args:
        optimizers: The optimizers.
        parameters: The parameters that are drawn.

    Note:
        Momentum multiplies what a step takes off in the end by 1 / (1 - momentum). Optimizers of Adam's kind divide by
        the root of their second moments, which is taken to be the same for all weights, and to stay. Of others it is
        not known what they do to gradients; they are taken to be gradient descent.

    Example:
        >>> weight = nn.Parameter(torch.ones(4))
        >>> pull = Pull([torch.optim.SGD([weight], lr=0.5, momentum=0.9)], [weight])
        >>> round(pull.scale(), 3)  # 1 - momentum
        0.1
        >>> pull.learning_rate()
        0.5
    """

    def __init__(self, optimizers: Iterable[Optimizer], parameters: list[nn.Parameter]) -> None:
        drawn = set(parameters)
        self._placed: list[tuple[dict[str, Any], dict[str, Any]]] = []  # settings and state, by parameter
        for optimizer in optimizers:
            for settings in optimizer.param_groups:
                states = [optimizer.state.get(parameter, {}) for parameter in settings["params"] if parameter in drawn]
                self._placed += [(settings, state) for state in states]

    def learning_rate(self) -> float:
        """Return the learning rate as it is now, on average over the parameters; 0 if none is optimized."""
        return _mean([float(settings["lr"]) for settings, _ in self._placed])

    def scale(self) -> float:
        """Return what gradients have to be multiplied by to move weights by the learning rate, on average."""
        return _mean([_scale(settings, state) for settings, state in self._placed])


def _scale(settings: dict[str, Any], state: dict[str, Any]) -> float:
    """Return what the gradients of one parameter have to be multiplied by."""
    if "exp_avg_sq" not in state or "betas" not in settings:
        return 1.0 - settings.get("momentum", 0.0)
    seen = 1 - settings["betas"][1] ** float(state["step"])  # moments begin at 0
    return math.sqrt(float(state["exp_avg_sq"].mean()) / seen)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
