"""Survey of a model: which layers run in which order, how much memory they take, and which lie behind each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.operators import Linear, Normalisation, Step
from lightning_prune.surgery.compensation.runs import Watch

__all__ = ["ByTensor", "Survey", "names_of", "survey", "uses_of"]

ACTIVATIONS = 2**28  # bytes that paused runs may keep
_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_JOINS = {"cat", "concat", "concatenate"}
_VIEWS = {
    "__getitem__", "expand", "expand_as", "flatten", "permute", "repeat", "reshape", "squeeze", "transpose",
    "unsqueeze", "view",
}  # fmt: skip
_PRODUCTS = {
    "__matmul__",
    "baddbmm",
    "bmm",
    "einsum",
    "matmul",
    "scaled_dot_product_attention",
}
_PER_LANE = 3  # what two paused runs keep, as a multiple of the input and output of a layer: branches among that

Known = TypeVar("Known")


@dataclass(frozen=True)
class Norm:
    """Batch normalisation by running statistics.

    Attributes:
        variance: Name of the running variance.
        scale: Name of the affine weight; None if there is none.
        eps: What is added to the variance.
    """

    variance: str
    scale: str | None
    eps: float

    def factor(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what each channel is multiplied by: (channels,).

        Args:
            tensors: The tensors of the network, by name.
        """
        regular = tensors[self.variance] + self.eps
        factor = regular.rsqrt()
        return factor if self.scale is None else factor * tensors[self.scale]


@dataclass
class Survey:
    """What one pass over a batch showed.

    Attributes:
        calls: How often each layer was called, by the name of its tensor, in the order of the first calls.
        normalised: The running mean of the batch normalisation that the output of a weight is given to, with nothing in
            between, by the names of both.
        added_to: The layer whose input is added to the output of a weight, normalised or not, by the names of
            both: they read the same residual stream.
        in_axis: The axis along which each weight consumes channels; None where it does so in convolution groups.
        bias_of: The name of the bias that goes with a weight.
        bytes: What the input and output of each layer take.
        norms: Each normalisation, by the name of its running mean.
        terms: Names of the tensors that are added to activations or joined with them, such as positions and class
            tokens: they make channels, and consume none.
        multiplies: Whether it multiplies tensors by functions that attention is made of.
    """

    calls: dict[str, int] = field(default_factory=dict)
    normalised: dict[str, str] = field(default_factory=dict)
    added_to: dict[str, str] = field(default_factory=dict)
    in_axis: dict[str, int | None] = field(default_factory=dict)
    bias_of: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    terms: set[str] = field(default_factory=set)
    multiplies: bool = False

    def lanes(self) -> dict[str, int]:
        """Return how many batches of this size may be under way at each layer."""
        allowed: dict[str, int] = {}
        fewest = 2**31
        for name in reversed(self.calls):
            per_lane = _PER_LANE * max(1, self.bytes[name])
            fewest = min(fewest, ACTIVATIONS // per_lane)
            allowed[name] = max(1, fewest)
        return allowed


@torch.no_grad()
def survey(model: nn.Module, make: Callable[..., Callable[[Any], Any]], batch: Any) -> Survey:
    """Run a model once and note its layers.

    Args:
        model: The model.
        make: Makes the network that is run, of the tensors of the model and no plan.
        batch: What it is run on.
    """
    tensors = named_tensors(model)
    run = make(tensors, None)
    watch = _Survey(names_of(tensors))
    with watch:
        run(batch)
    return watch.found


class _Survey(Watch):
    """Note layers, and by which tensors they are connected.

    Args:
        names: The name of each tensor of the model by its ``id``.

    Attributes:
        found: What was seen.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__(names, self._note)
        self.found = Survey()
        self._returned: ByTensor[str] = ByTensor()  # outputs of weights, normalised or not
        self._given: ByTensor[str] = ByTensor()  # inputs of layers
        self._viewed: ByTensor[str] = ByTensor()  # views of tensors of the model

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SUMS and len(args) == 2 and not kwargs:
            first, second = args
            self._note_sum(first, second)
            self._note_sum(second, first)
            self._note_terms(args)
        elif name in _JOINS:
            self._note_terms(args[0])
        elif name in _PRODUCTS:
            self.found.multiplies = True
        output = super().__torch_function__(func, types, args, kwargs)
        if name in _VIEWS and self._own_name(args[0]):
            self._viewed.set(output, self._own_name(args[0]))
        return output

    def _own_name(self, tensor: Any) -> str:
        """Return the name of the tensor of the model that this is or shows; empty if it is none."""
        return self.names.get(id(tensor)) or self._viewed.get(tensor) or ""

    def _note_terms(self, operands: Sequence[Any]) -> None:
        owners = [self._own_name(one) for one in operands]
        if "" in owners:  # else it is a weight that is computed from several
            self.found.terms.update(filter(None, owners))

    def _note_sum(self, output: Any, stream: Any) -> None:
        weight = self._returned.get(output)
        layer = self._given.get(stream)
        if weight and layer and output.shape == stream.shape:
            self.found.added_to[weight] = layer

    def _note(self, name: str, step: Step, proceed: Callable[[], Any]) -> Any:
        found = self.found
        output = proceed()
        calls = found.calls.get(name, 0)
        found.calls[name] = calls + 1
        numbers = step.x.numel() + output.numel()
        size = numbers * output.element_size()
        found.bytes[name] = max(size, found.bytes.get(name, 0))
        self._given.setdefault(step.given, name)
        if isinstance(step, Linear):
            self._note_weight(name, step, output)
        else:
            self._note_norm(name, step, output)
        return output

    def _note_weight(self, name: str, layer: Linear, output: Tensor) -> None:
        self._returned.set(output, name)
        self.found.in_axis[name] = layer.in_axis if layer.groups == 1 else None
        bias = self.names.get(id(layer.bias))
        if bias is not None:
            self.found.bias_of[name] = bias

    def _note_norm(self, name: str, norm: Normalisation, output: Tensor) -> None:
        variance = self.names[id(norm.variance)]
        scale = self.names.get(id(norm.scale))
        self.found.norms[name] = Norm(variance, scale, norm.eps)
        weight = self._returned.get(norm.x)
        if weight is not None:
            self.found.normalised[weight] = name
            self._returned.set(output, weight)


class ByTensor(Generic[Known]):
    """What is known of tensors, for as long as these exist."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Known]] = {}

    def set(self, tensor: Tensor, known: Known) -> None:
        """Note something of a tensor."""
        key = id(tensor)
        forgotten = ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = forgotten, known

    def setdefault(self, tensor: Any, known: Known) -> None:
        """Note something of a tensor that nothing is known of."""
        if isinstance(tensor, Tensor) and self.get(tensor) is None:
            self.set(tensor, known)

    def get(self, tensor: Any) -> Known | None:
        """Return what is known of a tensor, if anything is."""
        if id(tensor) not in self._known:
            return None
        reference, known = self._known[id(tensor)]
        is_same = reference() is tensor  # and not a later one in its place
        return known if is_same else None


def names_of(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Return the name of each tensor by its ``id``."""
    return {id(tensor): name for name, tensor in tensors.items()}


def uses_of(model: nn.Module) -> dict[str, int]:
    """Return how many modules have each tensor as their own, by its name; more than one share it."""
    names = names_of(named_tensors(model))
    uses = dict.fromkeys(names.values(), 0)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            name = names[id(tensor)]
            uses[name] += 1
    return uses
