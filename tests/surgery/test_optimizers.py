"""Optimizers of others: what they keep is sliced, or they are refused before anything is touched (invariant 5)."""

import copy
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import _global_optimizer_pre_hooks

import lightning_prune as lp
from lightning_prune.surgery.masks import mask

X = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
KEPT = {"0": torch.tensor([0, 1, 5, 6]), "2": torch.tensor([2, 3, 7])}
OTHERS_IN_A_CLOSURE: dict[Tensor, Tensor] = {}


def network(first: int = 8) -> nn.Sequential:
    """Four layers whose weights are all square, unless the first one takes another number of inputs."""
    torch.manual_seed(0)
    sizes = [first, 8, 8, 8]
    layers = [layer for size in sizes for layer in (nn.Linear(size, 8, bias=False), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def step(model: nn.Module, optimizer: Any, x: Tensor = X) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum() * 1e-2
        loss.backward()
        return loss

    optimizer.step(closure)


class Each(optim.Optimizer):
    """Does something with each parameter and what is known of it."""

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})
        self.prepare()

    def prepare(self) -> None: ...

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.update(parameter, self.state[parameter])
        return loss


class Signs(Each):
    """Moves by the sign of a momentum, as Lion does."""

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(0.9).add_(p.grad, alpha=0.1)
        p.sub_(1e-2 * momentum.sign())


class Orthogonal(Each):
    """Moves by the momentum made orthogonal, as Muon does: no element of the step is one element's business."""

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(0.9).add_(p.grad)
        left, _, right = torch.linalg.svd(momentum, full_matrices=False)
        p.sub_(1e-2 * left @ right)


class Anchored(Each):
    """Knows where each parameter was at first, and how often it has stepped."""

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        if not state:
            state.update(anchor=p.clone(), count=0, decay=torch.tensor(0.5))
        state["count"] += 1
        p.sub_(1e-2 * p.grad + 1e-3 * (p - state["anchor"]))


class Noisy(Each):
    """Sums up squares of gradients to which noise is added."""

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        squares = state.setdefault("squares", torch.zeros_like(p))
        squares.add_((p.grad + torch.randn_like(p)).square())
        p.sub_(1e-2 * p.grad / (squares.sqrt() + 1))


# -- state that follows the parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Signs, Anchored, optim.Adam, partial(optim.SGD, lr=0.1, momentum=0.9)])
def test_elementwise_steps_on_square_weights_are_those_of_the_masked_twin(kind: Callable[..., Any]):
    model = network()
    optimizer = kind(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    plan = lp.trace(model, X).plan(KEPT)
    twin = copy.deepcopy(model)
    twin_optimizer = kind(twin.parameters())
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        twin_optimizer.state[other] = copy.deepcopy(optimizer.state[parameter])
    mask(lp.trace(twin, X), plan)
    lp.prune(model, plan, [optimizer])
    step(model, optimizer)
    step(twin, twin_optimizer)
    index = plan.index()
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        pairs = [(parameter, expected)]
        for key, value in twin_optimizer.state[expected].items():
            if isinstance(value, Tensor) and value.dim() > 0:
                pairs.append((optimizer.state[parameter][key], value))
        for found, wanted in pairs:
            for axis, kept in index.get(name, {}).items():
                wanted = wanted.index_select(axis, kept)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


WHOLE_MATRICES = [Orthogonal]
if hasattr(optim, "Muon"):  # not before PyTorch 2.9
    WHOLE_MATRICES.append(partial(optim.Muon, lr=0.1))


@pytest.mark.parametrize("kind", WHOLE_MATRICES)
def test_steps_on_whole_matrices_go_on_with_the_state_of_what_is_kept(kind: Callable[..., Any]):
    model = network()
    optimizer = kind(model.parameters())
    step(model, optimizer)
    (key,) = optimizer.state[model[2].weight]
    before = optimizer.state[model[2].weight][key].clone()
    lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    assert torch.equal(optimizer.state[model[2].weight][key], before[KEPT["2"]][:, KEPT["0"]])
    step(model, optimizer)


def test_counters_and_single_numbers_are_kept():
    model = network()
    optimizer = Anchored(model.parameters())
    for _ in range(5):
        step(model, optimizer)
    lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    state = optimizer.state[model[2].weight]
    assert (state["count"], state["decay"].item(), state["anchor"].shape) == (5, 0.5, (3, 4))


def test_state_that_depends_on_chance_is_told_by_a_weight_that_is_not_square():
    model = network()
    optimizer = Noisy(model.parameters())
    step(model, optimizer)
    with pytest.raises(TypeError, match=r"Noisy keeps 'squares' of '0.weight' in the shape of the parameter, but its"):
        lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    model, x = network(5), X[:, :5]
    optimizer = Noisy(model.parameters())
    step(model, optimizer, x)
    before = optimizer.state[model[2].weight]["squares"].clone()
    lp.prune(model, lp.trace(model, x).plan(KEPT), [optimizer])
    assert torch.equal(optimizer.state[model[2].weight]["squares"], before[KEPT["2"]][:, KEPT["0"]])


# -- state in the shape of a parameter that is about something else ----------------------------------------------------


def left(p: Tensor, state: dict[str, Any]) -> None:
    state.setdefault("momentum", torch.zeros(len(p), len(p)).to(p)).add_(p.grad @ p.grad.T)


def right(p: Tensor, state: dict[str, Any]) -> None:
    size = p.shape[1]
    state.setdefault("momentum", torch.zeros(size, size).to(p)).lerp_(p.grad.T @ p.grad, 0.1)


def transposed(p: Tensor, state: dict[str, Any]) -> None:
    state.setdefault("momentum", torch.zeros_like(p.T)).add_(p.grad.T)


def rotated(p: Tensor, state: dict[str, Any]) -> None:
    """As SOAP and GaLore do: the numbers are along other axes than those of the weight."""
    axes = torch.linalg.eigh(p.grad.T @ p.grad).eigenvectors
    state.setdefault("momentum", torch.zeros_like(p)).add_((p.grad @ axes).square())


def flipped(p: Tensor, state: dict[str, Any]) -> None:
    state.setdefault("momentum", torch.zeros_like(p)).add_(p.grad.flip(1))


@pytest.mark.parametrize("known", [left, right, transposed, rotated, flipped])
def test_what_only_looks_like_momentum_is_refused(known: Callable[[Tensor, dict[str, Any]], None]):
    class Other(Each):
        def update(self, p: Tensor, state: dict[str, Any]) -> None:
            known(p, state)
            p.sub_(1e-2 * p.grad)

    model = network()
    optimizer = Other(model.parameters())
    step(model, optimizer)
    refused(model, optimizer, "weight' in the shape of the parameter, but its axes are other ones or cannot be told")


def refused(model: nn.Module, optimizer: Any, message: str) -> None:
    """Check that a prune is refused, and that nothing has been touched."""
    plan = lp.trace(model, X).plan(KEPT)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=re.escape(message)):
        lp.prune(model, plan, [optimizer])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(model, optimizer)


# -- state out of sight ------------------------------------------------------------------------------------------------


class Box:
    def __init__(self, p: Tensor) -> None:
        self.sums = torch.zeros_like(p)


class Slot:
    __slots__ = ("inside",)

    def __init__(self, p: Tensor) -> None:
        self.inside = {"deep": [Box(p)]}


class InObjects(Each):
    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        state.setdefault("box", Box(p)).sums.add_(p.grad)
        p.sub_(1e-3 * state["box"].sums)


class InSlots(Each):
    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        sums = state.setdefault("slot", Slot(p)).inside["deep"][0].sums
        p.sub_(1e-3 * sums.add_(p.grad))


class ByParameter(Each):
    def prepare(self) -> None:
        self.sums: dict[Tensor, Tensor] = {}

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(1e-3 * self.sums.setdefault(p, torch.zeros_like(p)).add_(p.grad))


class InAList(Each):
    def prepare(self) -> None:
        self.sums = [Box(p) for p in self.param_groups[0]["params"]]

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        (index,) = [index for index, other in enumerate(self.param_groups[0]["params"]) if other is p]
        p.sub_(1e-3 * self.sums[index].sums.add_(p.grad))


class InArrays(Each):
    def prepare(self) -> None:
        self.arrays: dict[int, Any] = {}

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        array = self.arrays.setdefault(id(p), np.zeros(p.shape))
        array += p.grad.numpy()
        p.sub_(1e-3 * torch.from_numpy(array))


class InGroups(Each):
    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        sums = self.param_groups[0].setdefault("sums", {})
        p.sub_(1e-3 * sums.setdefault(p, torch.zeros_like(p)).add_(p.grad))


class ByName(Each):
    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        sums = self.state["of everything"].setdefault(id(p), torch.zeros_like(p))
        p.sub_(1e-3 * sums.add_(p.grad))


class InTheClass(Each):
    sums: dict[Any, Any] = {}  # noqa: RUF012

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(1e-3 * self.sums.setdefault(p, torch.zeros_like(p)).add_(p.grad))


class InAClosure(Each):
    def prepare(self) -> None:
        sums: dict[Any, Any] = {}
        self.sum_up = lambda p: sums.setdefault(p, torch.zeros_like(p)).add_(p.grad)

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(1e-3 * self.sum_up(p))


class InAModule(Each):
    def prepare(self) -> None:
        self.average = nn.ParameterList([p.detach().clone() for p in self.param_groups[0]["params"]])

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(1e-3 * p.grad)


class Elsewhere(Each):
    """Keeps its sums where nobody would look."""

    def update(self, p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(1e-3 * OTHERS_IN_A_CLOSURE.setdefault(p, torch.zeros_like(p)).add_(p.grad))


OUT_OF_SIGHT = {
    InObjects: "InObjects keeps 'box' of '0.weight' in shape (8, 8)",
    InSlots: "InSlots keeps 'slot' of '0.weight' in shape (8, 8)",
    ByParameter: "ByParameter keeps numbers of shape (8, 8) in 'sums[...]', outside its state of the parameters",
    InAList: "InAList keeps numbers of shape (8, 8) in 'sums[0].sums', outside its state",
    InArrays: "InArrays keeps numbers of shape (8, 8) in 'arrays[",
    InGroups: "InGroups keeps numbers of shape (8, 8) in \"param_groups[0]['sums'][...]\"",
    ByName: "ByName keeps numbers of shape (8, 8) in \"state['of everything'][",
    InTheClass: "InTheClass keeps numbers of shape (8, 8) in 'sums[...]'",
    InAClosure: "InAClosure keeps numbers of shape (8, 8) in 'sum_up.sums[...]'",
    InAModule: "InAModule keeps numbers of shape (8, 8) in 'average.0'",
    Elsewhere: "Elsewhere cannot step any more once channels are pruned",
}


@pytest.mark.parametrize("kind", OUT_OF_SIGHT, ids=lambda kind: kind.__name__)
def test_state_out_of_sight_is_refused_before_anything_is_touched(kind: type[Each]):
    model = network()
    optimizer = kind(model.parameters())
    step(model, optimizer)
    refused(model, optimizer, OUT_OF_SIGHT[kind])


class Slow:
    """No optimizer itself: wraps one, and pulls the weights towards a slow copy."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.slow = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        self.zero_grad = optimizer.zero_grad

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        self.optimizer.step(closure)
        for p, slow in self.slow.items():
            p.copy_(slow.lerp_(p, 0.5))


def test_what_a_wrapper_keeps_is_refused():
    model = network()
    refused(model, Slow(optim.SGD(model.parameters(), 0.1)), "Slow keeps numbers of shape (8, 8) in 'slow[...]'")


class Hidden(Each):
    """Steps with an optimizer in an object, whose state has to follow too."""

    def prepare(self) -> None:
        self.boxes = [Slot(torch.zeros(1))]
        self.boxes[0].inside = {"adam": optim.Adam(self.param_groups[0]["params"], 1e-2)}

    def step(self, closure: Any = None) -> Any:
        return self.boxes[0].inside["adam"].step(closure)


def test_an_optimizer_deep_inside_another_loses_the_same_channels():
    model = network()
    optimizer = Hidden(model.parameters())
    step(model, optimizer)
    lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    step(model, optimizer)
    state = optimizer.boxes[0].inside["adam"].state[model[2].weight]
    assert (state["exp_avg"].shape, state["step"].item()) == ((3, 4), 2)


# -- what is none of our business --------------------------------------------------------------------------------------


def test_numbers_that_have_nothing_to_do_with_channels_are_kept():
    model = network()
    optimizer = Signs(model.parameters())
    optimizer.rate, optimizer.parameters = torch.tensor(0.5), list(model.parameters())
    optimizer.network, optimizer.names = model, {"0": "first"}
    step(model, optimizer)
    lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    step(model, optimizer)


def test_an_optimizer_of_another_network_may_keep_what_it_likes():
    model, other = network(), network()
    optimizer = ByParameter(other.parameters())
    step(other, optimizer)
    lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    step(other, optimizer)


def test_trying_an_optimizer_out_has_no_side_effects():
    """No step, hook or schedule of the optimizer itself is called, and nobody notices numbers that were drawn."""
    model = network()
    optimizer = Noisy(model.parameters())
    schedule = optim.lr_scheduler.StepLR(optimizer, 1)  # which sets a step of its own
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    step(model, optimizer)
    schedule.step()
    drawn = (torch.get_rng_state(), random.getstate())
    parameters = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    state = copy.deepcopy(list(optimizer.state.values()))
    attributes, groups = dict(vars(optimizer)), copy.copy(optimizer.param_groups[0])
    with pytest.raises(TypeError, match="cannot be told apart"):
        lp.prune(model, lp.trace(model, X).plan(KEPT), [optimizer])
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert called == [1]
    assert all(map(torch.equal, model.parameters(), parameters))
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert [list(each) for each in optimizer.state.values()] == [list(each) for each in state]
    pairs = zip(optimizer.state.values(), state, strict=True)
    assert all(torch.equal(one["squares"], other["squares"]) for one, other in pairs)
    assert vars(optimizer) == attributes
    assert optimizer.param_groups[0] == groups


class Around(optim.Optimizer):
    """Steps with another optimizer by a function that it was given, which may be one that a schedule has set."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {})
        self.inner = optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.schedule = optim.lr_scheduler.StepLR(self.inner, 10)
        self.step_inside = self.inner.step

    def step(self, closure: Any = None) -> None:
        closure()
        self.step_inside()


def test_a_step_that_a_schedule_has_set_is_not_called_by_a_trial():
    model = network()
    optimizer = Around(model.parameters())
    step(model, optimizer)
    weight = model[6].weight.detach().clone()
    lp.prune(model, lp.trace(model, X).plan({"0": KEPT["0"]}), [optimizer])
    assert torch.equal(model[6].weight, weight)
    assert optimizer.inner.state[model[2].weight]["momentum_buffer"].shape == (8, 4)
    step(model, optimizer)


# -- optimizers that a prune was not told of ---------------------------------------------------------------------------

TORCH: dict[str, Any] = {
    "Adam": optim.Adam,
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9),
    "Adagrad": optim.Adagrad,
    "Adafactor": optim.Adafactor,
    "several tensors at once": partial(optim.AdamW, foreach=True),
}


def hooks() -> int:
    return len(_global_optimizer_pre_hooks)


@pytest.mark.parametrize("kind", TORCH)
def test_an_optimizer_that_was_forgotten_says_so_at_its_next_step(kind: str) -> None:
    model, before = network(), hooks()
    forgotten, named = TORCH[kind](model.parameters()), optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for optimizer in (forgotten, named):
        step(model, optimizer)
    lp.prune(model, lp.trace(model, X).plan(KEPT), optimizers=named)
    assert hooks() == before  # one optimizer was named that trains all of it
    whole, other = network(), optim.SGD(network().parameters(), 0.1)
    optimizer = TORCH[kind](whole.parameters())
    step(whole, optimizer)
    lp.prune(whole, lp.trace(whole, X).plan(KEPT))
    step(network(), other)  # one of another model does not matter
    message = r" in shape \(8, [18]\) for a parameter that has been pruned to \(4, 8\) without it; name"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{type(optimizer).__name__} keeps '.*'{message}"):
            step(whole, optimizer)
    step(whole, TORCH[kind](whole.parameters()))  # a new one has nothing to keep
    assert hooks() == before


def test_an_optimizer_that_has_kept_nothing_yet_need_not_be_named() -> None:
    model, before = network(), hooks()
    optimizer = optim.Adam(model.parameters())
    lp.prune(model, lp.trace(model, X).plan(KEPT))
    for _ in range(2):
        step(model, optimizer)
    assert hooks() == before


def test_a_single_optimizer_may_be_named_as_several_are() -> None:
    models = [network(), network()]
    for model, form in zip(models, (lambda one: one, lambda one: [one]), strict=True):
        optimizer = optim.Adam(model.parameters())
        step(model, optimizer)
        lp.prune(model, lp.trace(model, X).plan(KEPT), optimizers=form(optimizer))
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
