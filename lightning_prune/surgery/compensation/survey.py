"""Survey of a model: which layers run in which order, how much memory they take, and which lie behind each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.operators import Linear, Step
from lightning_prune.surgery.compensation.runs import Watch

__all__ = ["Survey", "names_of", "survey", "uses_of"]

ACTIVATIONS = 2**29  # bytes that paused runs may keep
_PER_RUN = 3  # what a paused run keeps, as a multiple of the input and output of a layer: two networks, and branches


@dataclass
class Survey:
    """What one pass over a batch showed.

    Attributes:
        calls: How often each layer was called, by the name of its tensor, in the order of the first calls.
        normalised: Names of the weights whose output is given to batch normalisation by running statistics, and nothing
            in between.
        in_axis: The axis along which each weight consumes channels; None where it does so in convolution groups.
        bias_of: The name of the bias that goes with a weight.
        bytes: What the input and output of each layer take.
    """

    calls: dict[str, int] = field(default_factory=dict)
    normalised: set[str] = field(default_factory=set)
    in_axis: dict[str, int | None] = field(default_factory=dict)
    bias_of: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def lanes(self) -> dict[str, int]:
        """Return how many batches of this size may be under way at each layer."""
        allowed: dict[str, int] = {}
        fewest = 2**31
        for name in reversed(self.calls):
            fewest = min(fewest, max(1, ACTIVATIONS // (_PER_RUN * max(1, self.bytes[name]))))
            allowed[name] = fewest
        return allowed


@torch.no_grad()
def survey(model: nn.Module, forward: Callable[[nn.Module], Any]) -> Survey:
    """Run a model once and note its layers.

    Args:
        model: The model.
        forward: Runs it on a batch.
    """
    found = Survey()
    made: dict[int, tuple[Any, str]] = {}  # outputs of layers, by ``id``

    def note(name: str, step: Step, proceed: Callable[[], Any]) -> Any:
        if not isinstance(step, Linear):
            output, weight = made.get(id(step.x), (None, ""))
            if output is not None and output() is step.x:
                found.normalised.add(weight)
        output = proceed()
        found.calls[name] = found.calls.get(name, 0) + 1
        size = (step.x.numel() + output.numel()) * output.element_size()
        found.bytes[name] = max(size, found.bytes.get(name, 0))
        if isinstance(step, Linear):
            made[id(output)] = ref(output), name
            found.in_axis[name] = step.in_axis if step.groups == 1 else None
            if id(step.bias) in names:
                found.bias_of[name] = names[id(step.bias)]
        return output

    names = names_of(named_tensors(model))
    with Watch(names, note):
        forward(model)
    return found


def names_of(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Return the name of each tensor by its ``id``."""
    return {id(tensor): name for name, tensor in tensors.items()}


def uses_of(model: nn.Module) -> dict[str, int]:
    """Return how many modules have each tensor as their own, by its name; more than one share it."""
    names = names_of(named_tensors(model))
    uses = dict.fromkeys(names.values(), 0)
    for module in model.modules():
        own: Sequence[Tensor | None] = [*module._parameters.values(), *module._buffers.values()]
        for tensor in own:
            if tensor is not None:
                uses[names[id(tensor)]] += 1
    return uses
