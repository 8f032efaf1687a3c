"""The form in which candidates run fastest: what changes is speed, never what is measured."""

import copy
from typing import Any

import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_prune as lp
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.candidates.layout import fold, foldable, put_channels_last
from lightning_prune.candidates.measures import Evaluate, classification
from lightning_prune.surgery.batch_norm import recalibrate


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


class Counter(TorchDispatchMode):
    """Count the normalisations of batches."""

    normalisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.normalisations += "batch_norm" in str(func)
        return func(*args, **(kwargs or {}))


def measure(model: nn.Module, batch: Any) -> tuple[Any, float]:
    """Return the loss, in a way that the evaluator knows nothing of."""
    return F.cross_entropy(model(batch[0]), batch[1]), 0.0


@torch.no_grad()
@pytest.mark.parametrize("evaluate", [classification, measure])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_estimated_anew_give_what_a_pruned_copy_gives(
    kind: type[Plain], evaluate: Evaluate, batches: list[tuple[Tensor, Tensor]]
) -> None:
    graph = lp.trace(made(kind), batches[0][0])
    plans = [graph.plan({name: torch.arange(group.size - 2)}) for name, group in graph.groups.items()]
    measured = evaluate_candidates(graph, plans, batches, recalibrate=batches, evaluate=evaluate)
    for plan, loss in zip(plans, measured.loss, strict=True):
        copied = copy.deepcopy(graph.model)
        lp.prune(copied, plan)
        recalibrate(copied, [x for x, _ in batches])
        expected = F.cross_entropy(copied(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert len(plans) > 0


def test_normalisations_run_for_the_statistics_and_one_check_only(batches: list[tuple[Tensor, Tensor]]) -> None:
    graph = lp.trace(made(Plain), batches[0][0])
    plans = [graph.plan({"first": torch.arange(size)}) for size in (4, 5, 6)]
    with Counter() as counter:
        evaluate_candidates(graph, plans, batches, recalibrate=batches[:1])
    # Two normalisations: to see what there is, as a check, and for the statistics of each of three candidates.
    assert counter.normalisations == 2 * (1 + 1 + 3)


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
