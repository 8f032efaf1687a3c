"""Alignment: a soft regularization that draws the weights of channels to be pruned towards zero."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.masks import pruned_channels

__all__ = ["Alignment"]


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
    weights in them that would be pruned. Its gradient is added to that of the loss.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels to keep.
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
        >>> model[0].weight.grad.flatten()  # 0.1 / 5 times the weights that would be pruned
        tensor([0.0000, 0.0600, 0.0800])
    """

    def __init__(self, graph: ChannelGraph, plan: PruningPlan, strength: float, squared: bool = False) -> None:
        self.strength = strength
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
        """Return what is added to the loss."""
        if not self._slices:
            return 0.0
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(self._masked_weights())])
        terms = norms.square() if self.squared else norms
        return self.strength * float(terms.sum())

    @torch.no_grad()
    def add_gradient(self, factor: float = 1.0) -> None:
        """Add the gradient of the penalty to the gradients that are there; parameters without one are passed over.

        Args:
            factor: What the loss was multiplied by before its gradients were computed.
        """
        if not self._slices:
            return
        masked = self._masked_weights()
        for slices, weights, slope in zip(self._slices, masked, self._slopes(masked), strict=True):
            gradient = slices.parameter.grad
            if gradient is not None:
                gradient.add_(weights * slope, alpha=self.strength * factor)

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
