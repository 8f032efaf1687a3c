"""What fails half way leaves everything as it was: memory, Ctrl-C, a function of somebody (invariant 2)."""

import copy
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lightning_prune as lp
from lightning_prune.graph import sizes
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.surgery import pruned, replacing, reshape, uninterrupted

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2)
        )
    )


PLAN = lp.trace(network(), X).plan({"0": torch.tensor([0, 3, 4]), "3": torch.tensor([1, 2])})


class Training:
    """A network in the middle of its training, always the same."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.average = AveragedModel(self.model).module
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(X).square().sum().backward()
        self.optimizer.step()

    def prune(self) -> None:
        with pruned(self.model, PLAN, [self.optimizer], [self.average]):
            pass

    def everything(self) -> dict[str, Any]:
        """Return all that a prune changes, tensors with the place in memory that they have."""
        found: dict[str, Any] = {}
        for prefix, model in (("model", self.model), ("average", self.average)):
            found[prefix] = plan_in_force(model)
            for name, module in model.named_modules():
                named = {key: value for key, value in vars(module).items() if not key.startswith("_")}
                found[f"{prefix} {name}"] = (named, set(vars(module)))
            for name, tensor in model.state_dict(keep_vars=True).items():
                found[f"{prefix} {name} itself"] = tensor
                found[f"{prefix} {name} values"] = (tensor.detach().clone(), tensor.data_ptr(), tensor.stride())
                found[f"{prefix} {name} gradient"] = tensor.grad
        for index, parameter in enumerate(self.model.parameters()):
            found[f"state {index}"] = dict(self.optimizer.state[parameter])
        return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


def interrupting(monkeypatch: pytest.MonkeyPatch, before: int | None) -> list[int]:
    """Let whatever is put in place be counted, and raise before one of them; what the list holds is the count."""
    count = [0]
    made = replacing.Replacement.__new__

    def counted(cls: type, put: Callable[[], None], undo: Callable[[], None]) -> Any:
        def counting() -> None:
            if count[0] == before:
                raise KeyboardInterrupt
            count[0] += 1
            put()

        return made(cls, counting, undo)

    monkeypatch.setattr(replacing.Replacement, "__new__", counted)
    return count


def test_an_interrupt_before_any_put_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch):
    count = interrupting(monkeypatch, None)
    Training().prune()
    (puts,) = count
    assert puts > 30  # parameters, buffers, states of Adam, size attributes, of the model and of the average
    monkeypatch.undo()
    twin = Training()
    twin.prune()
    twin.step()
    for before in range(puts):
        training = Training()
        earlier = training.everything()
        with monkeypatch.context() as patch:
            interrupting(patch, before)
            with pytest.raises(KeyboardInterrupt):
                training.prune()
        assert same(training.everything(), earlier), before
        training.prune()
        training.step()
        assert same(training.model.state_dict(), twin.model.state_dict()), before


def test_an_error_at_any_line_leaves_everything_before_or_after():
    """Raises once, at each line of the room in turn: as a prune begins, while it makes, puts and ends."""
    before, after = Training(), Training()
    after.prune()
    wanted = [without_places(one) for one in (before, after)]
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    outcomes = []
    for line in range(0, 4000, 17):
        training = Training()
        if not raised_at(line, training.prune):
            break
        outcomes.append([same(without_places(training), one) for one in wanted])
        assert sum(outcomes[-1]) == 1, line
        assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert [True, False] in outcomes
    assert not raised_at(4000, Training().prune)


def without_places(training: Training) -> dict[str, Any]:
    return {name: value for name, value in training.everything().items() if "values" not in name}


# While these run, signals are what could raise something, and they wait; that has tests of its own.
GUARDS = {"uninterrupted", "_restore", "_raise_all"}


def raised_at(line: int, call: Callable[[], None]) -> bool:
    """Tell whether a call was interrupted before it had run that many lines of the room that replaces tensors."""
    run = [0]
    room = os.path.dirname(replacing.__file__)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(room) or frame.f_code.co_name in GUARDS:
            return None
        if event == "line":
            run[0] += 1
            if run[0] == line + 1:
                raise KeyboardInterrupt
        return trace

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(earlier)
    return False


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_for_any_tensor_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    take = replacing.take
    for number in range(1, 30):
        training, calls = Training(), []
        earlier = training.everything()

        def short(*args: Any, calls: list[int] = calls, number: int = number) -> Tensor:
            calls.append(1)
            if len(calls) == number:
                raise error("out of memory")
            return take(*args)

        monkeypatch.setattr(replacing, "take", short)
        monkeypatch.setattr("lightning_prune.surgery.optimizer_state.take", short)
        with pytest.raises(error):
            training.prune()
        assert same(training.everything(), earlier), number


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.ones(6)), 6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


def test_a_size_attribute_that_cannot_follow_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizes, "_SYNC_BY_CLASS_NAME", {})
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Scale(), nn.Conv2d(6, 2, 3))
    plan = lp.trace(model, X).plan({"0": torch.tensor([0, 3])})

    @sizes.size_attributes(sizes.class_name(model[1]))
    def follow(scale: Scale) -> None:
        scale.channels, scale.halves = len(scale.weight), len(scale.weight) // 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lp.prune(model, plan)
    assert (model[1].channels, hasattr(model[1], "halves"), model[0].out_channels) == (6, False, 6)
    assert [len(model[0].weight), len(model[1].weight), plan_in_force(model)] == [6, 6, None]
    model(X)


def test_what_follows_in_the_block_undoes_the_prune_when_it_fails():
    training = Training()
    earlier = training.everything()

    def wrapped_anew() -> None:
        with pruned(training.model, PLAN, [training.optimizer], [training.average]):
            assert training.model[0].out_channels == 3
            raise ConnectionError

    with pytest.raises(ConnectionError):
        wrapped_anew()
    assert same(training.everything(), earlier)


@pytest.mark.parametrize("before", range(2))
def test_reshape_and_masks_are_all_or_nothing(monkeypatch: pytest.MonkeyPatch, before: int):
    for call in (lambda one: reshape(one.model, PLAN), lambda one: lp.surgery.mask(lp.trace(one.model, X), PLAN)):
        training = Training()
        earlier = training.everything()
        with monkeypatch.context() as patch:
            interrupting(patch, before)
            with pytest.raises(KeyboardInterrupt):
                call(training)
        assert same(training.everything(), earlier)


def test_slices_that_overlap_get_their_values_back(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.arange(12.0).reshape(3, 4)
    before = tensor.clone()
    zeros = [replacing.of_zeros(tensor, 1, torch.tensor([0, 2])), replacing.of_zeros(tensor, 0, torch.tensor([1, 2]))]

    def masked() -> None:
        with replacing.in_place(zeros):
            assert tensor.tolist() == [[0, 1, 0, 3], [0] * 4, [0] * 4]
            raise MemoryError

    with pytest.raises(MemoryError):
        masked()
    assert torch.equal(tensor, before)


def test_statistics_are_as_they_were_when_a_batch_fails():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None)).train()
    model(torch.randn(8, 2))
    before = copy.deepcopy(model.state_dict())

    def run(module: nn.Module, batch: Tensor) -> None:
        module(batch)
        if batch[0, 0] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lp.surgery.recalibrate(model, [torch.zeros(4, 2), torch.ones(4, 2)], run)
    assert same(dict(model.state_dict()), dict(before))
    assert [(norm.training, norm.momentum) for norm in model] == [(True, 0.1), (True, None)]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C interrupt: shells that run a program in the background have it ignore that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_signals_wait_until_the_end_of_a_block():
    seen, earlier = [], signal.signal(signal.SIGUSR1, lambda *_: seen.append("a checkpoint is asked for"))

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGUSR1)
            seen.append("done")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert seen == ["done", "a checkpoint is asked for"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, earlier)


@pytest.mark.usefixtures("interruptible")
def test_a_block_in_another_thread_leaves_signals_alone():
    seen = []

    def run() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


PROGRAM = """
import signal, sys
import torch
from torch import nn
import lightning_prune as lp

torch.manual_seed(0)
model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 4))
optimizer = torch.optim.Adam(model.parameters())
model(torch.randn(3, 64)).sum().backward()
optimizer.step()
graph = lp.trace(model, torch.zeros(1, 64))
plan = graph.plan({name: torch.arange(32) for name in graph.groups})
signal.signal(signal.SIGALRM, signal.default_int_handler)
whole = 0
for trial in range(30):
    try:
        signal.setitimer(signal.ITIMER_REAL, 2e-4 * (trial + 1))
        lp.prune(model, plan, [optimizer])
    except KeyboardInterrupt:
        pass
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    width = len(model[0].weight)
    shapes = {tuple(each.shape) for each in model[2].parameters()}
    shapes |= {tuple(value.shape) for each in model[2].parameters() for value in optimizer.state[each].values()} - {()}
    assert shapes == {(width, width), (width,)}, shapes
    assert [model[0].out_features, model[24].in_features, model[24].weight.shape[1]] == [width] * 3
    assert (model.__dict__.get("_pruning_plan") is None) == (width == 64)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    if width == 32:
        lp.surgery.reshape(model, None)
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.zero_grad()
        model(torch.randn(3, 64)).sum().backward()
        optimizer.step()
    else:
        whole += 1
print(whole)
"""


def test_real_signals_find_a_whole_model():
    """A timer interrupts at thirty moments of a prune; each leaves the model as it was, or pruned."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 30
