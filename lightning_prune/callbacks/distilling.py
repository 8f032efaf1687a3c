"""Distillation in training: the network as it was before the first prune teaches what is left of it.

The forward passes that a training step makes are noted by hooks, which are there while a training step lasts. The
teacher makes the same ones, and what the two say is compared. That joins the loss right before the backward pass
starts from it: whatever the training step returns, and whatever it logs, is as it was.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.trainer_state import loss_scale, unlogged
from lightning_prune.compiled import as_written, forget_compiled, is_compiled
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.run import as_call
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.soft_targets import SoftTargets
from lightning_prune.surgery.compensation.copies import shared_twin, undisturbed

__all__ = ["Distill", "Distiller", "distill_settings", "logits_of", "weights_now"]

_NAMES = ("logits", "out")  # what transformers and torchvision call the logits among other outputs

Compare: TypeAlias = Callable[[Any, Any], Tensor]


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Distill(SoftTargets):
    """Say how the network before the first prune teaches the pruned one.

    Args:
        temperature: What the logits of both are divided by before they are compared, above 0.
        share: Share of the teacher in the loss, in (0, 1].
        axis: Where the classes of logits lie; default 1, as for ``cross_entropy``. Logits of three axes, which are as
            often of (n, positions, classes), need it.

    Raises:
        ValueError: If a setting is outside its range.
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis is not None and (type(self.axis) is not int or self.axis == 0):
            raise ValueError(f"axis must be a whole number other than 0, where samples lie; got {self.axis!r}.")


def distill_settings(given: Any) -> Distill | None:
    """Return the setting of a callback; None if nothing is to be distilled.

    Args:
        given: True, False, or some of the arguments of `Distill` by name.

    Raises:
        ValueError: If it is something else, or out of range.
    """
    if isinstance(given, bool):
        return Distill() if given else None
    names = ("temperature", "share", "axis")
    if not isinstance(given, Mapping) or not given.keys() <= set(names):
        raise ValueError(f"distill must be true, false or a mapping of {', '.join(names)}; got {given!r}.")
    try:
        return Distill(**given)
    except TypeError as raised:  # of what is no number
        raise ValueError(f"distill={dict(given)} is no setting: {raised}.") from raised


# -- what a network says -----------------------------------------------------------------------------------------------


def logits_of(output: Any, axis: int | None = None) -> Tensor:
    """Return the logits in what a network returns, as (n, classes): one row for each sample, or for each position.

    Args:
        output: A tensor; or one that is called ``logits`` or ``out`` in a dictionary or an object, or is alone in a
            tuple or list.
        axis: Where the classes lie; default 1, but for three axes.

    Raises:
        ValueError: If it cannot be told which numbers are the logits of classes.

    Example:
        >>> logits_of({"out": torch.zeros(2, 5, 4, 4)}).shape
        torch.Size([32, 5])
    """
    found = _among(output)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ValueError(_unlike(f"{_told(output)}, of which it cannot be told what the logits are"))
    if axis is None and found.dim() == 3:
        raise ValueError(
            f"The network returns logits of shape {tuple(found.shape)}: say which axis holds the classes, as in "
            "distill={'axis': 1} or {'axis': 2}."
        )
    at = 1 if axis is None else axis
    if found.dim() < 2 or at not in range(1 - found.dim(), found.dim()) or found.shape[at] < 2:
        raise ValueError(_unlike(f"{_told(found)}, without two classes or more on axis {at}"))
    single = found.float() if found.dtype in (torch.float16, torch.bfloat16) else found
    return single.movedim(at, -1).flatten(0, -2)


def _among(output: Any) -> Any:
    """Return what is called the logits, or is the only tensor, of an output."""
    for name in _NAMES:
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if hasattr(output, name) and not isinstance(output, Tensor):
            return getattr(output, name)
    if isinstance(output, tuple | list) and len(output) == 1:
        return output[0]
    return output


def _told(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    names = f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"a {type(output).__name__}{names}"


def _unlike(returned: str) -> str:
    return (
        f"distill compares logits of classes, and the network returns {returned}; override distillation_loss of the "
        "callback, or set distill=False."
    )


# -- what a training step does -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One forward pass of the network in a training step.

    Attributes:
        module: Dotted name of the module that was called.
        args: Its positional arguments, as they were then.
        kwargs: Its named arguments.
        output: What it returned.
    """

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Listener:
    """Notes the forward passes of a network that gradients will flow through; of calls within calls, the outer ones.

    Its hooks are there while a step lasts. Compiled code does not notice hooks that come and go: it has them all along.

    Args:
        modules: What counts as the network, by dotted name.
        model: What is trained.

    Attributes:
        calls: What was noted.
    """

    def __init__(self, modules: Mapping[str, nn.Module], model: nn.Module) -> None:
        self._modules = modules
        self._is_compiled = is_compiled(model)
        self._forwards: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._running: list[tuple[Any, Any] | None] = []
        self._listens = False
        self.calls: list[Call] = []

    def listen(self) -> None:
        """Note calls from now on."""
        self.pause()
        self._listens = True
        if not self._handles:
            self._attach()

    def pause(self) -> None:
        """Note no more, and drop what was noted."""
        self._listens = False
        self._running = []
        self.calls = []
        if not self._is_compiled:
            self._detach()

    def stop(self) -> None:
        """Note no more, and leave nothing behind."""
        self.pause()
        self._detach()

    def _attach(self) -> None:
        for name, module in self._modules.items():
            self._forwards[name] = module.forward
            before = self._before(name)
            after = self._after(name)
            if self._is_compiled:
                before = torch.compiler.disable(before)
                after = torch.compiler.disable(after)
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            self._handles.append(handle)
            handle = module.register_forward_hook(after, with_kwargs=True, always_call=True)
            self._handles.append(handle)
        if self._is_compiled:
            forget_compiled()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._is_compiled and self._handles:
            forget_compiled()
        self._handles = []

    def _before(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._listens:
                return
            # Distributed training runs training_step as the forward of the module, for a moment.
            is_forward = module.forward == self._forwards[name]
            is_outer = not any(entry is not None for entry in self._running)
            # Copies: what runs may change its inputs in place.
            self._running.append(tree_map(_copied, (args, kwargs)) if is_forward and is_outer else None)

        return note

    def _after(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = self._running.pop() if self._running else None
            if given is not None and any(_has_gradient(leaf) for leaf in tree_leaves(output)):
                self.calls.append(Call(name, *given, output))

        return note


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# -- the teacher -------------------------------------------------------------------------------------------------------


def weights_now(trainer: "pl.Trainer") -> dict[str, Tensor]:
    """Return copies of all parameters and buffers of the module, by name; those of the first rank on every rank."""
    module = trainer.lightning_module

    def copies() -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in named_tensors(module).items()}

    found: dict[str, Tensor] = decided_by_first_rank(trainer, copies)
    return found


class Distiller:
    """Lets the network before the first prune teach, once there is one.

    Args:
        trainer: The trainer.
        graph: The traced model.
        share: Share of the teacher in the loss.
        compare: Given what the network and what the teacher returns, tells how far they are apart.
    """

    def __init__(self, trainer: "pl.Trainer", graph: ChannelGraph, share: float, compare: Compare) -> None:
        self._trainer = trainer
        self._graph = graph
        self._share = share
        self._compare = compare
        self._weights: Mapping[str, Tensor] = {}
        self._teacher: nn.Module | None = None
        self._listener = Listener(_networks(graph), graph.model)
        self._is_tried = False

    def check(self) -> None:
        """Raise a ValueError if the module is of a kind that cannot be taught."""
        module = self._trainer.lightning_module
        if not module.automatic_optimization:
            raise ValueError(
                f"distill joins the one loss of a training step, and {type(module).__name__} optimizes manually, with "
                "any number of them; set distill=False, or let Lightning optimize."
            )
        if not self._graph.module:  # of a submodule alone it is not known what the whole module takes
            self._try_on_example()

    def _try_on_example(self) -> None:
        module = self._trainer.lightning_module
        model = self._network_with(self._weights)
        args, kwargs = as_call(self._graph.example_inputs)
        with undisturbed(module):
            output = self._run(model, tree_map(_copied, (args, kwargs)))
            self._compare(output, output)

    def teach_with(self, weights: Mapping[str, Tensor]) -> None:
        """Let a network with some weights teach from now on.

        Args:
            weights: Parameters and buffers of the module by name, of the shapes before the first prune.

        Raises:
            ValueError: If a parameter is not among them.
        """
        module = self._trainer.lightning_module
        missing = [name for name, _ in module.named_parameters() if name not in weights]
        if missing:
            raise ValueError(
                f"The teacher of distill, of the checkpoint, has no {missing[0]!r}, which {type(module).__name__} has; "
                "resume with the module that the checkpoint was written with."
            )
        self._weights = weights
        self._teacher = None

    def begin_epoch(self) -> None:
        """Let the teacher have the attributes that the module has now, and drop what it has gathered."""
        self._teacher = None

    def begin_step(self) -> None:
        """Watch the training step that begins."""
        if self._weights and self._teacher is None:
            self._teacher = self._network_with(self._weights)
        if self._weights or not self._is_tried:
            self._listener.listen()

    def join(self, loss: Tensor) -> tuple[Tensor, int] | None:
        """Add the teacher's share to the loss that the backward pass is about to start from, in place.

        Args:
            loss: The loss of the step, scaled as mixed precision wants it, and divided for accumulation.

        Returns:
            How far network and teacher are apart, and of how many samples; None before there is a teacher.

        Raises:
            ValueError: If the training step did not run the network, or what it returned cannot be compared.
        """
        calls = self._listener.calls
        if self._teacher is None and self._is_tried:
            return None
        self._listener.pause()  # the backward pass may run forward again
        if not calls:
            raise ValueError(self._unheard())
        if not self._is_tried:
            for call in calls:
                self._compare(tree_map(_copied, call.output), tree_map(_copied, call.output))
            self._is_tried = True
        if self._teacher is None:
            return None
        apart = [self._apart(self._teacher, call) for call in calls]
        mean = torch.stack(apart).mean()
        factor = loss_scale(self._trainer) / self._trainer.accumulate_grad_batches
        loss.mul_(1 - self._share).add_(mean, alpha=self._share * factor)
        return mean.detach(), _samples(calls)

    def end_step(self) -> None:
        """Drop what was noted of a training step that had no backward pass."""
        self._listener.pause()

    def stop(self) -> None:
        """Leave no hooks behind."""
        self._listener.stop()

    def _network_with(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return the module once more with some weights, which are not copied; the others are copies of its own."""
        module = self._trainer.lightning_module
        tensors = {}
        for name, own in named_tensors(module).items():
            tensor = weights[name] if name in weights else own.detach().clone()
            moved = tensor.to(own.device)
            tensors[name] = nn.Parameter(moved, requires_grad=False) if isinstance(own, nn.Parameter) else moved
        return shared_twin(module, tensors)

    def _apart(self, teacher: nn.Module, call: Call) -> Tensor:
        """Return how far the network is from its teacher in one forward pass."""
        expected = self._run(teacher.get_submodule(call.module), (call.args, call.kwargs))
        return self._compare(call.output, expected)

    def _run(self, model: nn.Module, given: tuple[Any, Any]) -> Any:
        args, kwargs = given
        precision = self._trainer.precision_plugin
        with torch.no_grad(), unlogged(model), as_written(), precision.train_step_context():
            return model(*args, **kwargs)

    def _unheard(self) -> str:
        name = type(self._trainer.lightning_module).__name__
        return (
            f"distill compares what {name} returns with what its teacher does, and training_step ran no forward pass "
            "of all that is trained with gradients; let training_step call self(...), or set distill=False."
        )


def _samples(calls: Iterable[Call]) -> int:
    leaves = [leaf for call in calls for leaf in tree_leaves(call.output) if _has_gradient(leaf) and leaf.dim()]
    return len(leaves[0]) if leaves else 1


def _networks(graph: ChannelGraph) -> dict[str, nn.Module]:
    """Return the modules that hold all that can be pruned and all that is trained: the whole module, and within it."""
    model = graph.model
    names = {slice_.tensor for group in graph.groups.values() for slice_ in group.slices}
    names |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shared, *others = [name.split(".")[:-1] for name in names]
    for path in others:
        pairs = zip(shared, path, strict=False)
        equal = [one == other for one, other in pairs]
        length = equal.index(False) if False in equal else len(equal)
        shared = shared[:length]
    paths = [".".join(shared[:length]) for length in range(len(shared) + 1)]
    return {path: model.get_submodule(path) for path in paths}
