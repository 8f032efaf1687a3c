"""Twins of models: whatever a forward pass does to its modules, the model is as it was, and both compute the same."""

import copy
import threading
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.graph.twin import NotATwinError, Twin
from lightning_prune.planning import measure_latency, profile
from lightning_prune.reporting.flops import count_flops
from lightning_prune.surgery import recalibrate

X = torch.arange(16.0).view(2, 8)
BATCHES = [(X, torch.tensor([0, 1]))]


class Base(nn.Module):
    """Two layers; what a subclass does on the way is what is to leave no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.layers = nn.Linear(8, 12), nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.norm, self.o = nn.BatchNorm1d(12), nn.Linear(12, 5)
        self.made = 0

    def on_run(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.i(x)).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.o(self.on_run(x))


class HooksOnFirstUse(Base):
    """The case of the issue: hooks on first use that collect into a list which each pass makes anew."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.made:
            for layer in self.layers:
                layer.register_forward_hook(lambda m, a, o: self.kept.append(o))
            self.made = 1
        self.kept: list[Tensor] = []
        x = super().forward(x)
        assert len(self.kept) == 2
        return x


class HooksThatCollect(Base):
    """Hooks from the beginning, of all kinds that refer to the module: closures, methods, partials, objects."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.by_name: dict[str, Any] = {}
        self.count = 0
        count = 0

        def counted(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal count
            count += 1
            self.count = count

        self.i.register_forward_hook(counted)
        self.i.register_forward_hook(lambda m, a, o, into=self.by_name: into.update(i=o))
        self.layers[0].register_forward_pre_hook(self.note)
        self.layers[1].register_forward_pre_hook(partial(HooksThatCollect.note, self))
        self.append = self.seen.append
        self.norm.register_forward_hook(lambda *a: self.append(a[2]))

    def note(self, module: nn.Module, args: Any) -> None:
        self.seen.append(args)

    def on_run(self, x: Tensor) -> Tensor:
        assert len(self.seen) % 3 == 0, "a pass sees what its own hooks have noted"
        assert list(self.by_name) == ["i"]
        assert self.count == len(self.seen) // 3
        return x


class SubmodulesOnFirstUse(Base):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.ModuleList()

    def on_run(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.ModuleDict({"norm": nn.LayerNorm(x.shape[-1], elementwise_affine=False, device=x.device)})
            self.register_buffer("table", torch.ones(x.shape[-1], device=x.device))
            self.scale = nn.Parameter(torch.ones((), device=x.device))
            self.spare.append(nn.Linear(1, 1))
        return self.late["norm"](x) * self.table * self.scale


class InPlace(Base):
    """What is written to in place: a table with a greatest norm, buffers, arrays, objects, weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 12, max_norm=0.1)
        self.register_buffer("calls", torch.zeros(()))
        self.array = np.zeros(2)
        self.stats = SimpleNamespace(calls=0, log=[])
        self.owner = Owner(self)
        self.words = Counter(a=1)
        self.nested = UserDict(calls=0)
        self.recent: deque[int] = deque([7], maxlen=2)

    def on_run(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.array[0] += 1
        self.stats.calls += 1
        self.stats.log.append(1)
        self.owner.calls += 1
        self.words["a"] += 1
        self.recent.append(1)
        with torch.no_grad():
            self.i.bias.clamp_(max=0.01)
        return self.owner.network().o_input(x) + self.table(torch.zeros(len(x), dtype=torch.long, device=x.device))

    def o_input(self, x: Tensor) -> Tensor:
        return x


@dataclass
class Owner:
    """An object of somebody's that refers to the network that holds it."""

    model: nn.Module
    calls: int = 0
    weak: Any = field(init=False)

    def __post_init__(self) -> None:
        self.weak = weakref.ref(self.model)

    def network(self) -> Any:
        assert self.weak() is self.model
        return self.model


class HandleOfHook(Base):
    """A hook of the model that its own forward pass takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.handle = self.i.register_forward_hook(lambda m, a, o: o * 1.0)

    def on_run(self, x: Tensor) -> Tensor:
        self.handle.remove()
        return x


class Hidden(Base):
    """Layers that are run by a list and by an attribute which are no submodules, and by a forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.layers[0], (self.layers[1],)]
        self.extra = [nn.Linear(12, 12)]
        original = self.o.forward
        self.o.forward = lambda x: original(x)
        self.calls = defaultdict(int)

    def on_run(self, x: Tensor) -> Tensor:
        self.calls[self.hidden[0]] += 1
        assert self.hidden[0] is self.layers[0]
        return self.extra[0](self.hidden[1][0](x)).relu()


class OwnGenerators(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def on_run(self, x: Tensor) -> Tensor:
        noise = torch.rand((), generator=self.generator).item() + self.numpy.random()
        return x + noise


KINDS = [HooksOnFirstUse, HooksThatCollect, SubmodulesOnFirstUse, InPlace, HandleOfHook, Hidden, OwnGenerators]


def plans(graph: Any) -> list[Any]:
    return [graph.plan({name: torch.arange(group.size // 2)}) for name, group in graph.groups.items()]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


RUNS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "trace": lambda graph, model: lp.trace(model, X),
    "candidates": lambda graph, model: evaluate_candidates(graph, plans(graph), BATCHES),
    "compensated": lambda graph, model: evaluate_candidates(
        graph, plans(graph), BATCHES, compensate="fold", compensate_batches=BATCHES
    ),
    "flops": lambda graph, model: count_flops(model, X),
    "latency": lambda graph, model: measure_latency(model, X, runs=2, warm_up=1),
    "profile": lambda graph, model: profile(graph, samples=1, runs=1),
    "taylor": lambda graph, model: criteria.taylor(graph, BATCHES, loss),
    "activations": lambda graph, model: criteria.apoz(graph, BATCHES, loss),
    "recalibrate": lambda graph, model: recalibrate(model, [X]),
}


def described(value: Any, seen: dict[int, Any]) -> Any:
    """Return all that a model consists of as nested plain values, by walking it: an independent account."""
    if id(value) in seen:
        return f"as before, {seen[id(value)]}"
    if isinstance(value, nn.Module | Tensor | list | dict | deque | set | np.ndarray | Owner | SimpleNamespace):
        seen[id(value)] = (len(seen), id(value))
    if isinstance(value, Tensor):
        return (type(value).__name__, id(value), value.requires_grad, value.tolist())
    if isinstance(value, nn.Module | Owner | SimpleNamespace | UserDict):
        return (type(value).__name__, id(value), [(k, described(v, seen)) for k, v in vars(value).items()])
    if isinstance(value, dict):
        return (id(value), [(str(type(k)), id(k), described(v, seen)) for k, v in value.items()])
    if isinstance(value, list | tuple | deque | set):
        return [described(v, seen) for v in value]
    if isinstance(value, np.ndarray):
        return (id(value), value.tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    cells = getattr(value, "__closure__", None) or ()
    return (repr(value), [described(cell.cell_contents, seen) for cell in cells])


@pytest.mark.filterwarnings("ignore:.*does not repeat the same operations")
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_as_it_was(kind: type[Base], run: str, ran_before: bool, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = kind()
    if ran_before:
        model(X)
    graph = lp.trace(model, X)
    statistics = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    before = described(model, {})
    RUNS[run](graph, model)
    if run == "recalibrate":  # which changes these and nothing else
        assert not torch.equal(model.norm.running_mean, torch.zeros(12))
        assert statistics == {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
        return
    assert described(model, {}) == before
    model(X)


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_computes_what_the_model_computes(kind: type[Base]) -> None:
    """Twice: before its first use, and after."""
    torch.manual_seed(0)
    model = kind().eval()
    for _ in range(2):
        output = Twin(model).model(X)
        torch.testing.assert_close(output, model(X), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [HooksThatCollect, Hidden])
def test_candidates_of_networks_that_refer_to_themselves_are_pruned_ones(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model, batch = kind().eval(), BATCHES[0]
    graph = lp.trace(model, X)
    kept = {"i": torch.arange(6)} if "i" in graph.groups else {"layers.0": torch.arange(6)}
    measured = evaluate_candidates(graph, [{}, kept], [batch])
    with torch.no_grad():
        lp.prune(model, graph.plan(kept))
        expected = loss(model, batch)
    torch.testing.assert_close(measured.loss[1], expected.double(), rtol=1e-5, atol=1e-5)
    assert measured.loss[0] != measured.loss[1]


GLOBAL = nn.Linear(12, 12)


class RunByAGlobal(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = GLOBAL

    def on_run(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


def test_what_no_twin_can_follow_is_named() -> None:
    with pytest.raises(NotATwinError, match=r"'layers.0' of RunByAGlobal is run by a global variable"):
        lp.trace(RunByAGlobal(), X)
    model = Base()
    graph = lp.trace(model, X)
    with pytest.raises(NotATwinError, match=r"'i' of Base is run by a global variable, or by one of an outer function"):
        evaluate_candidates(graph, [{}], BATCHES, evaluate=lambda given, batch: (loss(model, batch), 0.0))
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_method_of_the_model_measures_its_twins() -> None:
    class WithMethod(Base):
        def measured(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
            return loss(self, batch), 0.0

    model = WithMethod()
    graph = lp.trace(model, X)
    candidates = [{}, {"i": torch.arange(3)}]
    found = evaluate_candidates(graph, candidates, BATCHES, evaluate=model.measured)
    torch.testing.assert_close(found.loss, evaluate_candidates(graph, candidates, BATCHES).loss)
    assert found.loss[0] != found.loss[1]


class Colour(Enum):
    RED = 1


Pair = namedtuple("Pair", "left right")


class Releasing:
    released = 0

    def __del__(self) -> None:
        Releasing.released += 1


def test_what_takes_the_place_of_what() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    twin = Twin(model)
    lock, layer = threading.Lock(), twin.model[0]
    assert twin.of(model[0]) is layer
    assert twin.of(model[0].weight) is layer.weight is not model[0].weight
    for same in (lock, F.relu, torch.relu, F.max_pool2d, nn.Linear, Colour.RED, np, (1, "a"), Pair(1, 2), copy.copy):
        assert twin.of(same) is same
    releasing = Releasing()
    assert twin.of(releasing) is releasing
    assert twin.of(Pair(model[0], 1)) == Pair(layer, 1)
    ordered = twin.of(OrderedDict(b=model[0], a=1))
    assert list(ordered.items()) == [("b", layer), ("a", 1)]
    assert twin.of({model[0]: [model]}) == {layer: [twin.model]}
    assert twin.of({model[0], 3}) == {layer, 3}
    loop: list[Any] = [model[0]]
    loop.append(loop)
    assert twin.of(loop)[1] is twin.of(loop) is not loop
    assert twin.of(model[0].forward).__self__ is layer
    assert twin.of(weakref.ref(model[0]))() is layer


def test_a_stand_in_takes_every_place_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.also = [model[0].weight]
    stand_in = torch.zeros(2, 3)
    twin = Twin(model, {id(model[0].weight): stand_in}).model
    assert twin[0].weight is twin[1].weight is twin.also[0] is stand_in
    assert (twin[1].in_features, twin[1].out_features, model[1].in_features) == (3, 2, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)),
        lambda: nn.utils.weight_norm(nn.Linear(8, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)),
        lambda: nn.LSTM(8, 4, batch_first=True),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.ReLU())),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4), nn.ReLU())),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_of_pytorch_run_as_twins(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    given = (X, X, X) if isinstance(model, nn.MultiheadAttention) else (X,)
    twin = Twin(model).model
    torch.testing.assert_close(twin(*given), model(*given), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    changed, own = twin(*given), model(*given)
    assert not torch.equal(tree_leaves(changed)[0], tree_leaves(own)[0])
