"""Steps: other ways in which a network is run than its ``forward``, such as the method that trains it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.memory import Memory
from lightning_prune.graph.run import Forward
from lightning_prune.graph.tracer import Tracer, ValueWatcher
from lightning_prune.graph.twin import refusing_calls

__all__ = ["Step", "StepRun"]


def _nothing(model: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Step:
    """A method of a model that runs more than ``forward`` does, or what is inside it.

    Attributes:
        name: Name of the method.
        args: What it is given.
        training: The mode it runs in.
        prepare: What is done to the twin of the model that runs in its place: a step may write to loggers and step
            with optimizers, which are nobody else's.
    """

    name: str
    args: tuple[Any, ...]
    training: bool
    prepare: Callable[[nn.Module], None] = field(default=_nothing, repr=False)


class StepRun(Forward):
    """A step, to be run on stand-ins of the tensors of a model, which have the labels that its ``forward`` gives them.

    Args:
        forward: The forward pass, of the model or of a submodule.
        model: The model.
        step: The step.

    Attributes:
        memory: What ``forward`` returned, which is not run again for the like.
    """

    def __init__(self, forward: Forward, model: nn.Module, step: Step) -> None:
        vars(self).update(vars(forward))
        self.submodule = model
        self.step = step
        self.args, self.kwargs = step.args, {}
        self.real = False
        self.memory: Memory | None = None

    def _call(self, tracer: Tracer, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.step.prepare(model)
        run = tracer.watched(self.step.name, getattr(model, self.step.name))
        tracer.memory = self.memory if not self.real else None
        tracer.takes_numbers = False  # a loss may be a mean over fewer channels; what the network computes has been seen
        with _WithoutGradients(), ValueWatcher(tracer), tracer:
            return run(*args)

    def _mark_outputs(self, tracer: Tracer, output: Any) -> None:
        """Mark nothing: what a step returns is nothing that anybody relies on."""

    def _run_on_data(self, tracer: Tracer, training: bool) -> None:
        with refusing_calls(self.submodule):
            self.run(tracer, {}, training)

    def _mark_module_unprunable(self, tracer: Tracer, name: str) -> None:
        """Mark what a module does that looks at values, but not the step itself, which may look at a loss."""
        if name not in (self.step.name, self.names[id(self.submodule)], "the model"):
            super()._mark_module_unprunable(tracer, name)


class _WithoutGradients(TorchFunctionMode):
    """Let steps go on that ask for gradients, or write down a number, without data; decisions need the data."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.backward, torch.autograd.backward):
            return None
        if func is torch.autograd.grad:
            return _zeros_like(*args, **(kwargs or {}))
        if func in _NUMBERS and args[0].is_meta and args[0].numel() == 1:
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


_NUMBERS = (Tensor.item, Tensor.__float__)


def _zeros_like(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return what stands in for gradients: something of the same shape and the same channels."""
    of_one = isinstance(inputs, Tensor)
    return tuple(tensor * 0 for tensor in ([inputs] if of_one else inputs))
