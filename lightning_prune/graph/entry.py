"""Entry: how a network is entered, by its ``forward`` or, where it has none, by a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Step", "as_call", "let_in"]


def _nothing(model: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Step:
    """A method of a model that runs more than ``forward`` does, or what is inside it.

    Attributes:
        name: Name of the method.
        args: What it is given.
        training: The mode it runs in.
        hooks: Methods that run after it, each given what it makes of the output of the step.
        prepare: What is done to the twin of the model that runs in its place: a step may write to loggers and step
            with optimizers, which are nobody else's.
    """

    name: str
    args: tuple[Any, ...]
    training: bool
    prepare: Callable[[nn.Module], None] = field(default=_nothing, repr=False)
    hooks: Mapping[str, Callable[[Any], tuple[Any, ...]]] = field(default_factory=dict, repr=False)

    def ready(self, model: nn.Module) -> Callable[..., Any]:
        """Prepare a twin of the model, and return its method, which calls the hooks too."""
        self.prepare(model)
        method: Callable[..., Any] = getattr(model, self.name)

        def run(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            for name, arguments in self.hooks.items():
                hook = getattr(model, name)
                hook(*arguments(output))
            return output

        return run if self.hooks else method


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and named arguments: a dictionary names them, a tuple lists them."""
    if isinstance(example_inputs, Step):
        return example_inputs.args, {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def let_in(model: nn.Module, example_inputs: Any) -> None:
    """Let a twin be called with example inputs: if they are a step, that is its ``forward``."""
    if isinstance(example_inputs, Step):
        vars(model)["forward"] = example_inputs.ready(model)
