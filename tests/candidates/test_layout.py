"""The form in which candidates run fastest: what changes is speed, never what is measured."""

import copy
from typing import Any

import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.candidates import Memory, evaluate_candidates
from lightning_prune.candidates.layout import fold, foldable, put_channels_last
from lightning_prune.candidates.measures import Evaluate, classification


class Plain(nn.Module):
    """Two convolutions with normalisations behind them, of which the second has neither weight nor bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.bare = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.bare(self.second(x))).mean((2, 3)))


class UsedTwice(Plain):
    """What the first convolution returns is used before the normalisation, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(F.relu(self.bare(self.second(F.relu(self.norm(x)) + x))).mean((2, 3)))


class RunTwice(Plain):
    """One normalisation serves two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.norm(self.again(x)))
        return self.head(F.relu(self.bare(self.second(x))).mean((2, 3)))


class Viewing(Plain):
    """Cannot work with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.bare(self.second(x)))
        return self.head(x.view(len(x), -1))


class Asserting(Plain):
    """Cannot work with the channels last, and says so itself."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.first(x).is_contiguous()
        return super().forward(x)


class Named(Plain):
    """Passes what is to be normalised by name."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(input=self.first(x)))
        return self.head(F.relu(self.bare(self.second(x))).mean((2, 3)))


class Hooked(Plain):
    """A hook changes what a convolution returns, another the type of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, result: result + 1)
        self.second.register_forward_hook(lambda module, args, result: (result,))
        self.bare.register_forward_pre_hook(lambda module, args: args[0])


KINDS = [Plain, UsedTwice, RunTwice, Viewing, Asserting, Named, Hooked]


def made(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return randomised(kind()).double().eval()  # type: ignore[return-value]


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 3, 6, 6, dtype=torch.float64), torch.randint(5, (n,))) for n in (11, 5)]


def measure(model: nn.Module, batch: Any) -> tuple[Any, float]:
    """Return the loss, in a way that the evaluator knows nothing of."""
    return F.cross_entropy(model(batch[0]), batch[1]), 0.0


def expected(graph: Any, candidate: Any, method: str, batches: Any, seen: Any) -> Tensor:
    """Return the loss of a copy that is pruned and compensated: the way everybody would write it."""
    copied = copy.deepcopy(graph.model)
    lp.prune(copied, candidate, compensate=method, batches=[x for x, _ in batches])
    inputs, labels = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
    return F.cross_entropy(copied(inputs), labels)


@torch.no_grad()
@pytest.mark.parametrize("method", ["statistics", "fold", "refit"])
@pytest.mark.parametrize(("kind", "evaluate"), [*((kind, classification) for kind in KINDS), (Plain, measure)])
def test_compensated_candidates_are_compensated_copies(
    kind: type[Plain], evaluate: Evaluate, method: str, batches: list[tuple[Tensor, Tensor]]
) -> None:
    graph = lp.trace(made(kind), batches[0][0])
    plans = [graph.plan({name: torch.arange(group.size - 2)}) for name, group in graph.groups.items()]
    plans.append(graph.plan({name: torch.arange(1, group.size) for name, group in graph.groups.items()}))
    torch.manual_seed(2)
    seen = [(torch.randn(n, 3, 6, 6, dtype=torch.float64), torch.randint(5, (n,))) for n in (24, 40)]
    measured = evaluate_candidates(graph, plans, batches, compensate=method, compensate_batches=seen, evaluate=evaluate)
    for plan, loss in zip(plans, measured.loss, strict=True):
        torch.testing.assert_close(loss, expected(graph, plan, method, seen, batches), rtol=1e-9, atol=1e-9)
    uncompensated = evaluate_candidates(graph, plans, batches, evaluate=evaluate).loss
    assert (measured.loss - uncompensated).abs().max() > 1e-6


@pytest.mark.filterwarnings("ignore:.*does not repeat the same operations")
def test_what_is_collected_serves_later_calls_for_as_long_as_the_weights_are_the_same(
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    graph = lp.trace(made(Plain), batches[0][0])
    plan = graph.plan({"first": torch.arange(5)})
    memory = Memory()

    def measured() -> tuple[int, Tensor]:
        ended: list[nn.Module] = []
        note = nn.modules.module.register_module_forward_hook(lambda module, args, result: ended.append(module))
        with note:
            found = evaluate_candidates(
                graph, [plan], batches, compensate="fold", compensate_batches=batches, memory=memory
            )
        return sum(isinstance(module, Plain) for module in ended), found.loss[0]

    first, loss = measured()
    again, same = measured()
    assert first - again == 1 + 2 * len(batches)  # a survey, the statistics and the moments
    assert torch.equal(loss, same)
    with torch.no_grad():
        graph.model.first.weight.mul_(1.5)
    for failing in range(1, 7):  # whatever is collected when it fails: what is half of it does not count
        passes = 0

        def fail(module: nn.Module, args: Any, at: int = failing) -> None:
            nonlocal passes
            passes += isinstance(module, nn.Linear)
            if passes > at:
                raise KeyError("on purpose")

        with nn.modules.module.register_module_forward_pre_hook(fail), pytest.raises(KeyError):
            measured()
    _, other = measured()
    torch.testing.assert_close(other, expected(graph, plan, "fold", batches, batches), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_model_that_was_pruned_before_is_compensated_from_what_it_is_now() -> None:
    torch.manual_seed(3)
    seen = [(torch.randn(64, 3, 6, 6, dtype=torch.float64), torch.randint(5, (64,)))]
    graph = lp.trace(made(Plain), seen[0][0])
    first = {name: torch.arange(1, group.size) for name, group in graph.groups.items()}
    lp.prune(graph.model, graph.plan(first), compensate="fold", batches=[seen[0][0]])
    further = graph.plan({name: channels[1:] for name, channels in first.items()})
    measured = evaluate_candidates(graph, [further, {}], seen, compensate="fold", compensate_batches=seen)
    torch.testing.assert_close(measured.loss[0], expected(graph, further, "fold", seen, seen), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(measured.loss[1], F.cross_entropy(graph.model(seen[0][0]), seen[0][1]))


def test_each_candidate_takes_one_pass_to_be_compensated_and_those_that_measure_it(
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    graph = lp.trace(made(Plain), batches[0][0])

    def passes(count: int) -> int:
        plans = [graph.plan({"first": torch.arange(size)}) for size in range(2, 2 + count)]
        ended: list[nn.Module] = []
        note = nn.modules.module.register_module_forward_hook(lambda module, args, result: ended.append(module))
        with note:
            evaluate_candidates(graph, plans, batches, compensate="fold", compensate_batches=batches[:1])
        return sum(isinstance(module, Plain) for module in ended)

    measuring = len(batches)
    assert passes(3) - passes(2) == measuring  # what is behind the last normalisation is not run to compensate
    # To see what there is, to collect what all candidates share, and as a check.
    assert passes(2) <= 2 + 3 + 2 + 2 * measuring


@torch.no_grad()
@pytest.mark.parametrize(("kind", "pairs"), [(Plain, 2), (UsedTwice, 2), (RunTwice, 1), (Viewing, 2), (Named, 1)])
def test_convolutions_do_what_normalisations_behind_them_did(kind: type[Plain], pairs: int) -> None:
    model, x = made(kind), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before, found = foldable(model, lambda: model(x))
    assert len(found) == pairs
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    fold(model, found)
    same = torch.allclose(model(x), before, rtol=1e-10)
    assert same == (kind is not UsedTwice)  # which the evaluator finds out by trying


@torch.no_grad()
def test_channels_come_last_where_the_model_bears_it() -> None:
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for kind in (Plain, Viewing, Asserting):
        model = made(kind)
        model.again = nn.Conv2d(3, 8, 3)
        model.again.weight = model.first.weight  # tied
        own, expected = model.first.weight, model(x)
        torch.testing.assert_close(put_channels_last(model, lambda model=model: model(x)), expected)  # type: ignore[misc]
        assert model.again.weight is model.first.weight
        last = model.first.weight.is_contiguous(memory_format=torch.channels_last)
        assert (last, model.first.weight is own) == ((True, False) if kind is Plain else (False, True))


def test_what_fails_anyway_fails_with_its_own_error() -> None:
    model = made(Plain)
    with pytest.raises(RuntimeError, match="expected input"):
        put_channels_last(model, lambda: model(torch.randn(4, 2, 6, 6, dtype=torch.float64)))
    assert model.first.weight.is_contiguous()
