"""The candidate evaluator against a loop that prunes a copy for each candidate and runs it."""

import copy
import itertools
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import random_plan, randomised
from processes import warm
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_prune as lp
from lightning_prune.candidates import Noise, classification, evaluate_candidates
from lightning_prune.candidates.jobs import Job, Planner, Way, share
from lightning_prune.candidates.operator_trace import trace_operators
from lightning_prune.candidates.replay import DivergedError, Replay
from lightning_prune.candidates.stand_ins import maskable_layers, noisy_tensors
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors

Batch = tuple[Tensor, Tensor]


class Blocks(nn.Module):
    """A shortcut added in place, a depthwise convolution, activations in place, and glue between the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 4, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = F.relu6(self.norm(self.expand(x)), inplace=True)
        y = self.project(self.depthwise(y).relu_())
        x += y
        x = F.adaptive_avg_pool2d(self.last(x).tanh(), 2).flatten(1)
        return self.head(torch.sigmoid(self.hidden(x)))


class Sequence(nn.Module):
    """Turns the batch to the second axis on the way, so that repeated batches do not fit the glue."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        steps = self.first(x.flatten(2).permute(2, 0, 1)).relu()
        return self.head(self.second(steps).relu().view(16, n, 6).mean(0))


class Mixing(Sequence):
    """Subtracts the mean over the batch, so that samples depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.mean((2, 3))).relu())
        return self.head((x - x.mean(0)).relu())


class Restless(Sequence):
    """Does one operation more in every other pass of any such network."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Restless.passes += 1
        x = x.mean((2, 3)) + 0.0 if Restless.passes % 2 else x.mean((2, 3))
        return self.head(self.second(self.first(x).relu()).relu())


class Normalised(nn.Module):
    """Pruning changes the statistics of the normalisations: not mask-exact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x.mean((2, 3))))).relu())


class Attending(nn.Module):
    """Attention of torch's own over the positions of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).transpose(1, 2)).tanh()
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def made(kind: Callable[[], nn.Module], sizes: tuple[int, ...] = (6, 6, 3)) -> tuple[ChannelGraph, list[Batch]]:
    """Return a network filled with random numbers, traced, and batches for it, in double precision."""
    torch.manual_seed(0)
    graph = lp.trace(randomised(kind()).double(), torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    return graph, [(torch.randn(n, 3, 4, 4, dtype=torch.float64), torch.randint(5, (n,))) for n in sizes]


def single_prunings(graph: ChannelGraph) -> list[dict[str, Tensor]]:
    """Return the pruning of each channel alone."""
    prunings = []
    for name in graph.groups:
        kept = graph.kept(name)
        if len(kept) > 1:
            prunings += [{name: kept[kept != channel]} for channel in kept]
    return prunings


@torch.no_grad()
def naive(graph: ChannelGraph, candidates: list[Any], batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Prune a copy for each candidate and run it."""
    losses, accuracies = [], []
    for candidate in candidates:
        copied = copy.deepcopy(graph.model).eval()
        lp.prune(copied, graph.plan(candidate) if isinstance(candidate, dict) else candidate)
        outputs = torch.cat([copied(x) for x, _ in batches])
        labels = torch.cat([y for _, y in batches])
        losses.append(F.cross_entropy(outputs, labels))
        accuracies.append((outputs.argmax(1) == labels).double().mean())
    return torch.stack(losses), torch.stack(accuracies)


@pytest.mark.parametrize("sizes", [(6, 6, 3), (150,)], ids=["small batches", "a large batch"])
@pytest.mark.parametrize("kind", [Blocks, Sequence, Mixing, Normalised])
@pytest.mark.parametrize("pruned", [False, True])
def test_equals_pruning_a_copy(kind: type[nn.Module], sizes: tuple[int, ...], pruned: bool, recwarn: Any) -> None:
    graph, batches = made(kind, sizes)
    if pruned:
        first = next(iter(graph.groups))
        lp.prune(graph.model, graph.plan({first: torch.arange(1, graph.groups[first].size)}))
    candidates = [{}, *single_prunings(graph)]
    if not pruned:
        candidates += [random_plan(graph) for _ in range(8)]
    measured = evaluate_candidates(graph, candidates, batches)
    loss, accuracy = naive(graph, candidates, batches)
    torch.testing.assert_close(measured.loss, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(measured.accuracy, accuracy, rtol=0, atol=1e-12)
    assert measured.loss.std() > 1e-3  # candidates differ
    assert not [warning for warning in recwarn if "same operations" in str(warning.message)]


class Embedded(nn.Module):
    """Compares images with representations of the classes, which do not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.text = nn.Parameter(torch.zeros(5, 4)), nn.Linear(4, 8)
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        classes = self.text(self.classes)
        return self.last(self.second(self.first(x.mean((2, 3))).relu()).relu()) @ classes.t()


class Functional(nn.Module):
    """Uses the weight of one layer without calling it, and that of another in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.mean((2, 3))).relu()).relu()
        x = F.linear(x, self.third.weight, self.third.bias).relu()
        return self.head(x) + F.linear(x.square(), self.head.weight)


class Computed(nn.Module):
    """Weights that are computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1))
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.third = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4,)])
@pytest.mark.parametrize("kind", [Embedded, Functional, Computed])
def test_masks_and_stacks_are_for_layers_and_batches_that_bear_them(
    kind: type[nn.Module], sizes: tuple[int, ...]
) -> None:
    graph, batches = made(kind, sizes)
    single = single_prunings(graph)
    both = [{**one, **other} for one, other in itertools.pairwise(single) if one.keys() != other.keys()]
    candidates = [{}, *single, *both, *(random_plan(graph) for _ in range(8))]
    measured = evaluate_candidates(graph, candidates, batches)
    torch.testing.assert_close(measured.loss, naive(graph, candidates, batches)[0], rtol=1e-9, atol=1e-9)
    assert len(both) > 0


def test_a_network_that_never_does_the_same_is_run_plainly() -> None:
    graph, batches = made(Restless)
    candidates = single_prunings(graph)
    with pytest.warns(UserWarning, match="Restless does not repeat the same operations"):
        measured = evaluate_candidates(graph, candidates, batches)
    torch.testing.assert_close(measured.loss, naive(graph, candidates, batches)[0], rtol=1e-9, atol=1e-9)


class Counter(TorchDispatchMode):
    """Count the rows that go through convolutions and linear layers."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default):
            self.rows += (args[0] if func is torch.ops.aten.convolution.default else args[1]).shape[0]
        return func(*args, **(kwargs or {}))


def test_what_comes_before_the_first_difference_is_run_once() -> None:
    graph, (batch, *_) = made(Blocks)
    candidates = [{"hidden": torch.arange(10)[torch.arange(10) != channel]} for channel in range(10)]
    calls: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, Blocks):  # a twin of the model
            calls.append(len(output))

    handle = nn.modules.module.register_module_forward_hook(count)
    with Counter() as counter:
        evaluate_candidates(graph, candidates, [batch])
    handle.remove()
    # Seven layers for six samples: to see what there is, as a check and up to the boundary; then the head for each.
    assert counter.rows <= 6 * (7 + 7 + 6 + 10)
    assert sorted(calls) == [6, 6, 60]  # the candidates as one batch; the pass up to the boundary has no end


def test_a_replay_refuses_other_operations() -> None:
    x, weight = torch.ones(2), torch.tensor([1.0, 3.0])
    trace = trace_operators(lambda: (x + 1) * weight, {"weight": weight})
    assert trace.first_use == {"weight": 1}
    with pytest.raises(DivergedError, match=r"the operation has been aten.add.Tensor and is now aten.sub.Tensor"):
        Replay(lambda: (x - 1) * weight, trace.operations, 2).advance(1)
    replay = Replay(lambda: (x + 1) * weight, trace.operations, 2)
    replay.advance(1)
    assert replay.run(lambda: (x + 1) * (weight + 1)).tolist() == [4.0, 8.0]
    with pytest.raises(DivergedError, match=r"operation 0 has been aten.add.Tensor and is now aten.sub.Tensor"):
        replay.run(lambda: (x - 1) * weight)
    with pytest.raises(DivergedError, match="the pass has no operation 2"):
        replay.advance(2)


@pytest.mark.filterwarnings("ignore:.*does not repeat the same operations")
def test_leaves_no_trace() -> None:
    graph, batches = made(Blocks)
    model = graph.model.train()
    model.head.eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    modes = [module.training for module in model.modules()]
    before, attributes = (
        copy.deepcopy(model.state_dict()),
        {name: list(m.__dict__) for name, m in model.named_modules()},
    )
    gradients = [p.grad.clone() for p in model.parameters()]
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    candidates = [*single_prunings(graph), random_plan(graph), Noise("expand", 0.5, 1)]
    random = torch.get_rng_state()
    evaluate_candidates(graph, candidates, batches, compensate="fold", compensate_batches=batches)
    evaluate_candidates(graph, candidates, batches)
    calls = 0

    def fails(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls >= 9:
            raise KeyError("on purpose")
        return classification(model, batch)

    with pytest.raises(KeyError, match="on purpose"):
        evaluate_candidates(graph, candidates, batches, evaluate=fails, compensate="fold", compensate_batches=batches)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert {name: list(m.__dict__) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("method", ["statistics", "fold", "refit"])
@pytest.mark.parametrize("kind", [Blocks, Attending])
def test_candidates_can_be_compensated(kind: Callable[[], nn.Module], method: str) -> None:
    graph, batches = made(kind)
    candidates = [{}, *single_prunings(graph)[::5], random_plan(graph)]
    seen = batches[1:]
    measured = evaluate_candidates(graph, candidates, batches, compensate=method, compensate_batches=seen)
    for candidate, loss in zip(candidates, measured.loss, strict=True):
        copied = copy.deepcopy(graph.model).eval()
        plan = graph.plan(candidate) if isinstance(candidate, dict) else candidate
        lp.prune(copied, plan, compensate=method, batches=[x for x, _ in seen])
        expected = F.cross_entropy(torch.cat([copied(x) for x, _ in batches]), torch.cat([y for _, y in batches]))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_statistics_follow_noise() -> None:
    graph, batches = made(Blocks)
    noise = Noise("stem", 0.5, 3)
    measured = evaluate_candidates(graph, [noise], batches, compensate="fold", compensate_batches=batches)
    noisy = copy.deepcopy(graph.model).eval()
    noisy.load_state_dict({**noisy.state_dict(), **noisy_tensors(graph, noise, named_tensors(graph.model))})
    given: dict[nn.Module, list[Tensor]] = {}
    with ExitStack() as hooks:
        for model in (graph.model.eval(), noisy):
            given[model] = []
            hooks.enter_context(
                model.norm.register_forward_pre_hook(lambda _, args, seen=given[model]: seen.append(args[0]))
            )
            for x, _ in batches:
                model(x)
    before, now = (torch.cat(given[model]) for model in (graph.model, noisy))
    noisy.norm.running_mean += now.mean((0, 2, 3)) - before.mean((0, 2, 3))
    variances = [x.var((0, 2, 3), correction=0) + noisy.norm.eps for x in (now, before)]
    noisy.norm.running_var += noisy.norm.eps
    noisy.norm.running_var *= variances[0] / variances[1]
    noisy.norm.running_var -= noisy.norm.eps
    expected = F.cross_entropy(torch.cat([noisy(x) for x, _ in batches]), torch.cat([y for _, y in batches]))
    torch.testing.assert_close(measured.loss[0], expected, rtol=1e-9, atol=1e-9)


def test_compensated_candidates_are_replayed_from_their_first_difference_on() -> None:
    graph, batches = made(Blocks)
    last = list(graph.groups)[-1]
    candidates = [{last: torch.arange(graph.group(last).size - 1 - n)} for n in (0, 1)]

    def rows(count: int) -> int:
        with Counter() as counter:
            evaluate_candidates(graph, candidates[:count], batches, compensate="fold", compensate_batches=batches)
        return counter.rows

    samples = sum(len(x) for x, _ in batches)
    assert rows(2) - rows(1) == 2 * samples  # the last two layers


def test_what_candidates_are_compensated_on_is_noted(tmp_path: Path) -> None:
    graph, batches = made(Blocks)
    plan = random_plan(graph)
    measured = []
    for method, seen in (("none", []), ("statistics", batches), ("fold", batches), ("fold", batches[:1])):
        settings: dict[str, Any] = {"compensate": method, "compensate_batches": seen}
        first = evaluate_candidates(graph, [plan], batches, resume=tmp_path, **settings)
        again = evaluate_candidates(graph, [plan], batches, resume=tmp_path, **settings)
        assert torch.equal(first.loss, again.loss)
        measured.append(float(first.loss))
    assert len(set(measured)) == 4


def test_compensation_is_refused_without_data_or_by_a_name_that_is_none() -> None:
    graph, batches = made(Blocks)
    with pytest.raises(ValueError, match="give `compensate_batches`"):
        evaluate_candidates(graph, [{}], batches, compensate="fold")
    with pytest.raises(ValueError, match="compensate must be one of"):
        evaluate_candidates(graph, [{}], batches, compensate="folded", compensate_batches=batches)
    wrong = [(torch.full_like(batches[0][0], torch.nan), batches[0][1])]
    with pytest.raises(ValueError, match="look for NaN in the batches"):
        evaluate_candidates(graph, [{}], batches, compensate="fold", compensate_batches=wrong)


def test_noise_is_on_the_weights_of_one_group_and_the_same_for_a_seed() -> None:
    graph, batches = made(Blocks)
    seen: list[dict[str, Tensor]] = []

    def look(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        seen.append({name: value.clone() for name, value in model.named_parameters()})
        return classification(model, batch)

    noises = [Noise("stem", 0.25, 3), Noise("stem", 0.25, 4)]
    one = evaluate_candidates(graph, noises, batches[:1], evaluate=look)
    other = evaluate_candidates(graph, [*noises, noises[0]], batches[:1])
    assert torch.equal(one.loss, other.loss[:2])
    assert other.loss[0] == other.loss[2] != other.loss[1]
    changed = {
        name
        for weights in seen
        for name, weight in weights.items()
        if not torch.equal(weight, graph.model.get_parameter(name))
    }
    assert changed == {"stem.weight", "project.weight"}  # what makes the channels
    weight = graph.model.stem.weight
    spread = [((weights["stem.weight"] - weight).std() / weight.std()).item() for weights in seen[-2:]]
    assert spread == pytest.approx([0.25, 0.25], rel=0.15)


def test_other_tasks_bring_their_own_measure() -> None:
    graph, batches = made(Sequence)
    candidates = [{}, *single_prunings(graph)]

    def squares(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return model(batch[0]).square().mean(), 0.5

    measured = evaluate_candidates(graph, candidates, batches, evaluate=squares)
    expected = []
    for candidate in candidates:
        copied = copy.deepcopy(graph.model)
        lp.prune(copied, graph.plan(candidate))
        expected.append(torch.cat([copied(x) for x, _ in batches]).square().mean().detach())
    torch.testing.assert_close(measured.loss, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert measured.accuracy.tolist() == [0.5] * len(candidates)


def test_refuses_what_is_no_classification() -> None:
    graph, ((x, y), *_) = made(Sequence)
    for batch in (x, (x, y.double()), {"x": x}, (x, y, y)):
        with pytest.raises(ValueError, match=r"no pair of inputs and labels that are integers; .*pass `evaluate`"):
            evaluate_candidates(graph, [{}], [batch])
    with pytest.raises(ValueError, match=r"shape \(6, 5\) for labels of shape \(6, 2\), which are no logits"):
        evaluate_candidates(graph, [{}], [(x, torch.stack([y, y], 1))])
    with pytest.raises(
        ValueError, match="`evaluate` must return two numbers, loss and accuracy; it has returned Tensor"
    ):
        evaluate_candidates(graph, [{}], [(x, y)], evaluate=lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match="There are no batches"):
        evaluate_candidates(graph, [{}], [])
    with pytest.raises(ValueError, match="'nowhere' is no channel group"):
        evaluate_candidates(graph, [{"nowhere": torch.tensor([0])}], [(x, y)])


# -- resuming ----------------------------------------------------------------------------------------------------------


def slow(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    time.sleep(0.02)
    return classification(model, batch)


def _measure_slowly(folder: str) -> None:
    torch.set_num_threads(1)
    graph, batches = made(Blocks)
    evaluate_candidates(graph, single_prunings(graph), batches, evaluate=slow, resume=folder)


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = warm().Process(target=_measure_slowly, args=(str(tmp_path),))
    process.start()
    journal = tmp_path / "rank0.jsonl"
    while process.is_alive() and (not journal.exists() or journal.read_bytes().count(b"\n") < 20):
        time.sleep(0.005)
    process.kill()
    process.join()
    graph, batches = made(Blocks)
    noted = journal.read_bytes().count(b"\n")
    assert 20 <= noted < len(single_prunings(graph)) * len(batches)
    with journal.open("ab") as file:
        file.write(b'["half a li')
    calls: list[float] = []
    monkeypatch.setattr(time, "sleep", calls.append)  # as `slow` does each time
    resumed = evaluate_candidates(graph, single_prunings(graph), batches, evaluate=slow, resume=tmp_path)
    assert len(calls) < len(single_prunings(graph)) * len(batches)
    unbroken = evaluate_candidates(graph, single_prunings(graph), batches, evaluate=slow)
    assert torch.equal(resumed.loss, unbroken.loss)
    assert torch.equal(resumed.accuracy, unbroken.accuracy)
    assert journal.read_bytes().count(b"\n") == len(single_prunings(graph)) * len(batches)


def test_results_of_another_model_are_not_taken(tmp_path: Path) -> None:
    graph, batches = made(Blocks)
    evaluate_candidates(graph, single_prunings(graph), batches, resume=tmp_path)
    with torch.no_grad():
        graph.model.head.weight.mul_(2)
    measured = evaluate_candidates(graph, single_prunings(graph), batches, resume=tmp_path)
    torch.testing.assert_close(measured.loss, naive(graph, single_prunings(graph), batches)[0], rtol=1e-9, atol=1e-9)


def scaled(model: nn.Module, batch: Batch, factor: float) -> tuple[Tensor, Tensor]:
    loss, accuracy = classification(model, batch)
    return factor * loss, accuracy


def closed_over(factor: float) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    return lambda model, batch: scaled(model, batch, factor)


def test_results_of_another_measure_or_network_are_not_taken(tmp_path: Path) -> None:
    graph, batches = made(Blocks)
    candidates = single_prunings(graph)[:3]
    for make in (lambda factor: partial(scaled, factor=factor), closed_over):
        for factor in (1.0, 3.0):
            found = evaluate_candidates(graph, candidates, batches, evaluate=make(factor), resume=tmp_path).loss
            expected = evaluate_candidates(graph, candidates, batches, evaluate=make(factor)).loss
            assert torch.equal(found, expected)
    losses = []
    for activation in (nn.ReLU(), nn.Tanh()):
        other = lp.trace(nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 2)), torch.zeros(1, 2))
        other.model.load_state_dict({name: torch.ones_like(value) for name, value in other.model.state_dict().items()})
        batch = (torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
        losses.append(evaluate_candidates(other, [{"0": torch.tensor([0])}], [batch], resume=tmp_path / "other").loss)
    assert len(list((tmp_path / "other").iterdir())) == 1
    assert len((tmp_path / "other" / "rank0.jsonl").read_text().splitlines()) == 2


def test_a_measure_that_cannot_be_known_again_is_not_noted(tmp_path: Path) -> None:
    graph, batches = made(Sequence)
    with pytest.raises(ValueError, match="Results cannot be noted in `resume`: <object object at"):
        evaluate_candidates(graph, [{}], batches, evaluate=partial(scaled, factor=object()), resume=tmp_path)


@pytest.mark.parametrize("line", ["no json\n", '["key", 1.0]\n', '["key", "a", "b", 2]\n'])
def test_a_damaged_file_is_named(line: str, tmp_path: Path) -> None:
    graph, batches = made(Sequence)
    (tmp_path / "rank0.jsonl").write_text(json.dumps(["key", 1.0, 1.0, 4]) + "\n" + line)
    with pytest.raises(ValueError, match=r"Line 2 of '.*rank0.jsonl' is no measurement: the file is damaged"):
        evaluate_candidates(graph, [{}], batches, resume=tmp_path)


# -- two ranks ---------------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    graph, batches = made(Blocks)
    calls = 0

    def counted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return classification(model, batch)

    candidates = [{}, *single_prunings(graph), Noise("stem", 0.5, 0)]
    shared = evaluate_candidates(graph, candidates, batches, resume=f"{folder}/notes")
    again = evaluate_candidates(graph, candidates, batches, evaluate=counted)
    own = evaluate_candidates(graph, candidates, batches[rank::2], own_data=True)
    waiting = lp.trace(nn.SyncBatchNorm.convert_sync_batchnorm(graph.model), batches[0][0])
    anew = evaluate_candidates(waiting, candidates, batches, compensate="fold", compensate_batches=batches[:1])
    results = {"shared": shared, "again": again, "own": own, "anew": anew}
    torch.save({**{name: (m.loss, m.accuracy) for name, m in results.items()}, "calls": calls}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_agree_with_one(tmp_path: Path) -> None:
    warm()
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    graph, batches = made(Blocks)
    candidates = [{}, *single_prunings(graph), Noise("stem", 0.5, 0)]
    alone = evaluate_candidates(graph, candidates, batches)
    anew = evaluate_candidates(graph, candidates, batches, compensate="fold", compensate_batches=batches[:1])
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert torch.equal(rank["shared"][0], alone.loss)
        assert torch.equal(rank["shared"][1], alone.accuracy)
        torch.testing.assert_close(rank["again"][0], alone.loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rank["own"][0], alone.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank["anew"][0], anew.loss, rtol=1e-9, atol=1e-9)  # no rank waits for the other
        assert rank["calls"] < 0.75 * len(candidates) * len(batches)
    notes = [(tmp_path / "notes" / f"rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert sum(map(len, notes)) == len(candidates) * len(batches)
    assert min(map(len, notes)) > 0.2 * len(candidates) * len(batches)


# -- how candidates are run --------------------------------------------------------------------------------------------


def test_ways_and_what_they_cost() -> None:
    """Layers in a row, so that FLOPs can be worked out by hand: 16 inputs, 8 and 8 channels, 2 outputs."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = lp.trace(model, torch.zeros(1, 16))
    x = torch.zeros(4, 16)
    with torch.no_grad():
        trace = trace_operators(lambda: model(x), dict(model.named_parameters()))
    names = [str(operation).removeprefix("aten.").removesuffix(".default") for operation in trace.operations]
    assert names == ["t", "addmm", "relu"] * 2 + ["t", "addmm"]
    assert [trace.first_use[f"{layer}.weight"] for layer in (0, 2, 4)] == [0, 3, 6]
    one, few = torch.arange(1, 8), torch.arange(2)
    candidates = [{"2": one}, {"0": one}, {"0": few, "2": few}, {}, {"2": one[1:]}, {"0": one[:-1], "2": one}]
    planner = Planner(graph, trace, maskable_layers(model))
    jobs = planner.jobs([graph.plan(kept) for kept in candidates], stack=2)
    model_cost = 16 * 8 + 8 * 8 + 8 * 2
    assert jobs == [
        Job(Way.SLICED, 0, (2,), 1 + 16 * 2 + 2 * 2 + 2 * 2 + model_cost),
        Job(Way.STACKED, 3, (1, 5), 1 + 2 * (8 * 8 + 8 * 2) + model_cost),
        Job(Way.STACKED, 6, (0, 4), 1 + 2 * 8 * 2 + model_cost),
        Job(Way.PLAIN, 8, (3,), 1 + model_cost + model_cost),
    ]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_all_jobs_evenly(world: int) -> None:
    torch.manual_seed(0)
    jobs = [Job(Way.MASKED, number, (number,), float(cost)) for number, cost in enumerate(torch.rand(400))]
    shares = [share(jobs, rank, world) for rank in range(world)]
    assert sorted(job.boundary for shared in shares for job in shared) == list(range(400))
    costs = [sum(job.cost for job in shared) for shared in shares]
    assert max(costs) - min(costs) <= 4
    assert [share(jobs[:1], rank, 3) for rank in range(3)].count([]) == 2
