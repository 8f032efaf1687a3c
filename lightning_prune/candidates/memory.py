"""Memory of what was collected to compensate candidates: it serves all calls that are about the same network."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_prune.candidates.measures import Evaluate
from lightning_prune.candidates.notes import digest_of_values
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.many_plans import Collected

__all__ = ["Memory"]


class Memory:
    """What `evaluate_candidates` has collected in its last call; given to the next one, it is not collected again.

    It is dropped where weights, batches or the measure have changed.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> from lightning_prune.candidates import Memory, evaluate_candidates
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 2))
        >>> memory, batches = Memory(), [(torch.randn(8, 2), torch.randint(2, (8,)))]
        >>> for kept in ([0, 1], [1, 2]):
        ...     plans = [{"0": torch.tensor(kept)}]
        ...     _ = evaluate_candidates(
        ...         graph, plans, batches, compensate="fold", compensate_batches=batches, memory=memory
        ...     )
    """

    def __init__(self) -> None:
        self._digest = ""
        self._evaluate: Evaluate | None = None
        self._collected = Collected()

    def of(self, model: nn.Module, batches: Sequence[Any], evaluate: Evaluate) -> Collected:
        """Return what was collected of a model, or what is empty and to be filled.

        Args:
            model: The model.
            batches: What candidates are compensated on.
            evaluate: What runs the model.
        """
        tensors = list(named_tensors(model).items())
        digest = digest_of_values((repr(model), tensors, list(batches)))
        if digest != self._digest or evaluate != self._evaluate:
            self._digest = digest
            self._evaluate = evaluate
            self._collected = Collected()
        return self._collected
