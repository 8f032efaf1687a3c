"""Soft regularization that aligns weights with the channels that are to stay."""

import torch
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.masks import pruned_channels

__all__ = ["Alignment"]


class Alignment:
    """Pull the weights of channels that a plan removes towards zero, layer by layer.

    The penalty is the sum, over the layers that make the channels and those that read them, of the Euclidean norm of
    all weights of the layer that would leave. Its gradient is added to that of the loss.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels that are to stay.
        strength: What the penalty is multiplied by.
        squared: Whether norms are squared.

    Note:
        Ganjdanesh et al., "Jointly Training and Pruning CNNs via Learnable Agent Guidance and Alignment" (CVPR 2024):
        a group norm, not squared. That there is one norm for each layer and side is known from a reproduction only.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> model[0].weight.data, model[2].weight.data = torch.tensor([[1.0], [3.0], [4.0]]), torch.ones(1, 3)
        >>> graph = trace(model, torch.zeros(1, 1))
        >>> alignment = Alignment(graph, graph.plan({"0": torch.tensor([0])}), strength=0.1)
        >>> alignment.penalty()  # 0.1 * (5 + sqrt(2))
        0.6414...
        >>> model[0].weight.grad = torch.zeros(3, 1)
        >>> alignment.add_gradient()
        >>> model[0].weight.grad.flatten()  # 0.1 / 5 times the weights that would leave
        tensor([0.0000, 0.0600, 0.0800])
    """

    def __init__(self, graph: ChannelGraph, plan: PruningPlan, strength: float, squared: bool = False) -> None:
        self.strength, self.squared = strength, squared
        self._parameters: list[Tensor] = []
        self._masks: list[Tensor] = []  # 1 where weights would leave
        tensors = named_tensors(graph.model)
        for name, planned in plan.groups.items():
            channels, group = pruned_channels(graph, name, planned), graph.group(name)
            for part in (*group.out_slices, *group.in_slices) if len(channels) else ():
                weight = tensors[part.tensor]
                if isinstance(weight, nn.Parameter):
                    positions = graph.positions_now(part, channels).to(weight.device)
                    self._parameters.append(weight)
                    self._masks.append(torch.zeros_like(weight, requires_grad=False))
                    self._masks[-1].index_fill_(part.axis, positions, 1)

    @torch.no_grad()
    def penalty(self) -> float:
        """Return what is added to the loss."""
        if not self._parameters:
            return 0.0
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(self._leaving())])
        return self.strength * float((norms.square() if self.squared else norms).sum())

    @torch.no_grad()
    def add_gradient(self, factor: float = 1.0) -> None:
        """Add the gradient of the penalty to the gradients that are there; parameters without one are passed over.

        Args:
            factor: What the loss was multiplied by before its gradients were computed.
        """
        if not self._parameters:
            return
        leaving = self._leaving()
        for parameter, weights, slope in zip(self._parameters, leaving, self._slopes(leaving), strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(weights * slope, alpha=self.strength * factor)

    def _leaving(self) -> list[Tensor]:
        return list(torch._foreach_mul([parameter.detach() for parameter in self._parameters], self._masks))

    def _slopes(self, leaving: list[Tensor]) -> list[Tensor]:
        """Return what weights are multiplied by for the gradient of their norm; none where all are zero."""
        norms = torch._foreach_norm(leaving)
        if self.squared:
            return [torch.full_like(norm, 2.0) for norm in norms]
        return [norm.reciprocal().masked_fill(norm == 0, 0.0) for norm in norms]
