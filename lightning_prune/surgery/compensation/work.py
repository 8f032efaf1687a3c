"""What a compensation works with."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_prune.pruning_plan import Index, PruningPlan
from lightning_prune.surgery.compensation.operators import Linear
from lightning_prune.surgery.compensation.survey import Survey
from lightning_prune.surgery.compensation_report import CompensationReport

__all__ = ["Work"]


@dataclass
class Work:
    """What a compensation works with.

    Attributes:
        model: The network before the prune.
        plan: The channels to keep, about the original model.
        kept: The positions to keep of its tensors as they are now, by name and axis.
        tensors: The tensors of the pruned network, by name, which may be written to.
        survey: Which layers run.
        report: What has been done.
        uncompensated: Weights as they would be without compensation, by name, where they have been folded already.
        changed: Names of the tensors that were written to.
    """

    model: nn.Module
    plan: PruningPlan
    kept: Index
    tensors: dict[str, Tensor]
    survey: Survey
    report: CompensationReport
    uncompensated: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor of the pruned network other values."""
        tensor.data.copy_(values)
        self.changed.update(name for name, other in self.tensors.items() if other is tensor)

    def has(self, tensor: Tensor | None) -> bool:
        """Tell whether a tensor is one of the pruned network's own, so that what is written to it counts."""
        return any(tensor is other for other in self.tensors.values())

    def takes_up_means(self, name: str, step: Linear) -> bool:
        """Tell whether something behind a weight takes up a constant: a bias, or normalisation."""
        return name in self.survey.normalised or self.has(step.bias)

    def consumes_pruned(self, name: str) -> bool:
        """Tell whether channels that a weight sums over are pruned."""
        axis = self.survey.in_axis.get(name)
        return axis is not None and axis in self.kept.get(name, {})
