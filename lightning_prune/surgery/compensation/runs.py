"""Runs of a forward pass that pause where they are asked to, so that several can be carried forward together."""

import threading
from collections.abc import Callable, Container, Mapping
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_prune.surgery.compensation.operators import READ_CALL, Step

__all__ = ["PausedRun", "Watch"]

OnStep = Callable[[str, Step, Callable[[], Any]], Any]
"""Given the name of a layer's tensor, its call and what goes on with it, returns the output."""


class Watch(TorchFunctionMode):
    """Show the calls of layers that compensation knows, in whatever module or function they are.

    Args:
        names: The name of each tensor of the model by its ``id``.
        on_step: What each call is given to.
    """

    def __init__(self, names: Mapping[int, str], on_step: OnStep) -> None:
        super().__init__()
        self.names = names
        self.on_step = on_step

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = READ_CALL.get(func)
        step = read(*args, **kwargs) if read else None
        name = self.names.get(id(step.state)) if step else None
        if step is None or name is None:
            return func(*args, **kwargs)
        return self.on_step(name, step, lambda: func(*args, **kwargs))


class _StoppedError(BaseException):
    """Ends a run that is not needed to its end; no ``except Exception`` of a model is to stop it."""


class PausedRun:
    """A forward pass in a thread of its own, which never runs at the same time as another.

    Args:
        forward: Runs the model.
        names: The name of each of its tensors by ``id``.
        pause_at: The tensors at whose layers to pause; may change while the run is paused.
        before: Whether to pause before a layer runs, or after it.
        streams: The layer whose input is to be noted for another layer, by the names of their tensors.

    Attributes:
        name: The tensor at whose layer the run is paused; None before the start and at the end.
        step: The call.
        output: What it returned, if the pause is after it.
        noted: The inputs of earlier layers that are noted for later ones, by the tensors of these.
    """

    def __init__(
        self,
        forward: Callable[[], Any],
        names: Mapping[int, str],
        pause_at: Container[str],
        before: bool,
        streams: Mapping[str, str],
    ) -> None:
        self.noted: dict[str, Tensor] = {}
        self._streams = streams
        self.name: str | None = None
        self.step: Step | None = None
        self.output: Tensor | None = None
        self.finished = False
        self._forward = forward
        self._names = names
        self._pause_at = pause_at
        self._before = before
        self._error: BaseException | None = None
        self._stopping = False
        self._go: SimpleQueue[None] = SimpleQueue()
        self._paused: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self) -> None:
        """Run to the next pause, or to the end; raise what the forward pass raises."""
        if self.finished or (self.name is not None and self.name in self._pause_at):
            return
        self._resume()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the run where it is."""
        self._stopping = True
        if self._thread.is_alive():
            self._resume()
            self._thread.join()

    def _resume(self) -> None:
        self.name = self.step = self.output = None
        if self._thread.ident is None:
            self._thread.start()
        self._go.put(None)
        self._paused.get()

    def _run(self) -> None:
        self._go.get()
        try:
            with torch.no_grad(), Watch(self._names, self._on_step):
                self._forward()
        except _StoppedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._paused.put(None)

    def _on_step(self, name: str, step: Step, proceed: Callable[[], Any]) -> Any:
        for later, earlier in self._streams.items():
            if earlier == name:
                self.noted[later] = step.x
        if name not in self._pause_at:
            output = proceed()
        elif self._before:
            self._pause(name, step, None)
            output = proceed()
        else:
            output = proceed()
            self._pause(name, step, output)
        self.noted.pop(name, None)
        return output

    def _pause(self, name: str, step: Step, output: Tensor | None) -> None:
        self.name = name
        self.step = step
        self.output = output
        self._paused.put(None)
        del step, output
        self._go.get()
        if self._stopping:
            raise _StoppedError
