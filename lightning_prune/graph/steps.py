"""Steps: other ways in which a network is run than its ``forward``, such as the method that trains it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.compiled import as_written
from lightning_prune.graph.entry import Step
from lightning_prune.graph.memory import Memory
from lightning_prune.graph.neutral import neutral_state
from lightning_prune.graph.run import ALL_KEPT, Forward
from lightning_prune.graph.tracer import Tracer, ValueWatcher
from lightning_prune.graph.twin import Twin, refusing_calls, set_mode

__all__ = ["StepRun", "first_call", "run_step"]


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
        self.needs_data = {False: False, True: False}
        self.real = False
        self.memory: Memory | None = None
        self.remembered = False

    def let_in(self, model: nn.Module) -> None:
        """Let the step in later: it is no ``forward``."""

    def _call(self, tracer: Tracer, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = tracer.watched(self.step.name, self.step.ready(model))
        tracer.memory = self.memory if not self.real else None
        tracer.takes_numbers = (
            False  # a loss may be a mean over fewer channels; what the network computes has been seen
        )
        with _WithoutGradients(), ValueWatcher(tracer), tracer:
            return run(*args)

    def _mark_outputs(self, tracer: Tracer, output: Any) -> None:
        """Mark nothing: what a step returns is nothing that anybody relies on."""

    def _run_on_data(self, tracer: Tracer, training: bool) -> None:
        with refusing_calls(self.submodule):
            self.run(tracer, ALL_KEPT, training)

    def _mark_module_unprunable(self, tracer: Tracer, name: str) -> None:
        """Mark what a module does that looks at values, but not the step itself, which may look at a loss."""
        if name not in (self.step.name, self.names[id(self.submodule)], "the model"):
            super()._mark_module_unprunable(tracer, name)


class _WithoutGradients(TorchFunctionMode):
    """Let steps go on that ask for gradients, or write down a number, without data; decisions need the data."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return None
        if func is torch.autograd.grad:
            return _zeros_like(*args, **kwargs)
        if func in _NUMBERS:
            number = args[0]
            if number.is_meta and number.numel() == 1:
                return 0.0 if number.is_floating_point() else 0
        return func(*args, **kwargs)


_BACKWARD = (Tensor.backward, torch.autograd.backward)
_NUMBERS = (Tensor.item, Tensor.__float__)


def _zeros_like(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return what stands in for gradients: something of the same shape and the same channels."""
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    return tuple(tensor * 0 for tensor in inputs)


class _ReachedError(BaseException):
    """A submodule is about to run; no code of anybody catches this."""

    def __init__(self, *call: Any) -> None:
        super().__init__()
        self.call = call


def first_call(model: nn.Module, modules: Sequence[str], step: Step) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what the first of some submodules to run is given by a step; the step goes no further.

    Args:
        model: The model, of which a twin runs.
        modules: Dotted names of the submodules; empty for the model itself.
        step: The step, with data.

    Returns:
        The positional and the named arguments; None if none of them runs.

    Raises:
        Exception: Whatever the step raises before.
    """
    try:
        run_step(model, step, modules)
    except _ReachedError as reached:
        args, kwargs = reached.call
        return args, kwargs
    return None


def run_step(model: nn.Module, step: Step, stop_at: Sequence[str] = (), **named: Any) -> Any:
    """Run a step on a twin of a model, with data and without gradients, and return what it returns.

    Args:
        model: The model.
        step: The step.
        stop_at: Dotted names of submodules that are not to run any more.
        named: Named arguments of the step.

    Raises:
        Exception: Whatever the step raises.
    """
    with neutral_state(model), as_written():
        twin = Twin(model).model
        set_mode(twin, step.training)
        run = step.ready(twin)
        for name in stop_at:
            vars(twin.get_submodule(name))["forward"] = _reached
        with _WithoutGradients(), refusing_calls(model):
            return run(*step.args, **named)


def _reached(*args: Any, **kwargs: Any) -> None:
    raise _ReachedError(args, kwargs)
