"""Each row of the benchmark of criteria prunes to its budget, and no row changes what another one gets."""

import copy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from shortened import ordinary
from torch import nn

import lightning_prune as lp
from lightning_prune.models import build_network

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # scripts import what is beside them
rows = import_module("finetune_rows")
OURS = [name for name, row in rows.ROWS.items() if isinstance(row, rows.Ours)]
RIVALS = [name for name, row in rows.ROWS.items() if isinstance(row, rows.TorchPruning)]
ONE_OF_EACH_KIND = (
    "random channels", "AFIE, L1", "sensitiveness, L1", "L1", "group magnitude, inside blocks", "Taylor A, 8 steps",
    "Taylor gate, a quarter of each layer stays", "random search, L1", "Taylor gate for each FLOP", "coherent OBS",
)  # fmt: skip
PAID = {name: row for name, row in rows.ROWS.items() if isinstance(row, rows.AtEqualCost)}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("vgg11_bn", width=1 / 16)


@pytest.fixture
def batches(network: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return images with labels that the network gives them."""
    images = torch.randn(2, 4, 3, 32, 32)
    return [(each, network.eval()(each).argmax(1)) for each in images]


@pytest.fixture(autouse=True)
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "EPISODES", 20)


@pytest.mark.parametrize("name", ordinary(OURS, *ONE_OF_EACH_KIND))
def test_rows_prune_to_their_budget_in_one_step_or_several(name: str, network: nn.Module, batches):
    prune = rows.ROWS[name].begin(network, batches)
    before = prune(0.75, [])
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    rows.loss_of(network.train(), batches[0]).backward()
    optimizer.step()
    after = prune(0.5, [optimizer])
    assert 0.4 < after["flops"] <= 0.5 < before["flops"] <= 0.75
    assert all(width <= before["widths"][group] for group, width in after["widths"].items())
    assert network(batches[0][0]).shape == (4, 10)
    optimizer.step()


def test_a_quarter_of_each_layer_stays_even_if_it_scores_least(network: nn.Module, monkeypatch: pytest.MonkeyPatch):
    graph = lp.trace(network.eval(), rows.EXAMPLE)
    scores = {name: torch.rand(group.size) + 1 for name, group in graph.groups.items()}
    best = scores["features.15"].topk(8).indices
    scores["features.15"] -= 9
    monkeypatch.setattr(rows.criteria, "score", lambda *_: {name: each.clone() for name, each in scores.items()})
    group = rows.with_a_quarter("any", graph, [], 0.5).groups["features.15"]
    assert group.kept == tuple(best.sort().values.tolist())
    assert len(rows.by_score("any", graph, [], 0.5).groups["features.15"].kept) < 8


def test_a_search_takes_the_best_of_all_its_episodes(network: nn.Module, monkeypatch: pytest.MonkeyPatch):
    graph = lp.trace(network.eval(), rows.EXAMPLE)
    played = []

    def narrow_first(plans):  # the narrower the first layer, the better
        played.extend(plan.widths["features.0"] for plan in plans)
        return -torch.tensor(played[-len(plans) :]) / 4

    monkeypatch.setattr(rows, "accuracy_of", lambda *_, **__: narrow_first)
    plan = rows.searched("random", graph, [], 0.5)
    assert len(played) == 20
    assert len(set(played)) > 1
    assert plan.widths["features.0"] == min(played)


@pytest.mark.long
@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="needs the extra `benchmark`")
@pytest.mark.parametrize(("name", "network_name"), list(zip(RIVALS, ["resnet20", "vgg11_bn"], strict=True)))
def test_the_rival_prunes_to_the_same_budget(name: str, network_name: str):
    model = build_network(network_name, **({"width": 1 / 8} if network_name == "vgg11_bn" else {}))
    found = rows.ROWS[name].begin(model, [])(0.5, [])
    assert 0.45 < found["flops"] <= 0.5
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_rival_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, network: nn.Module):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SystemExit, match="needs Torch-Pruning: pip install"):
        rows.ROWS[RIVALS[0]].begin(network, [])


def test_rows_at_equal_cost_prune_as_the_rows_that_they_are_of(network: nn.Module, batches, monkeypatch):
    assert [name for name, row in PAID.items() if row.distilled] == [name for name in PAID if "distilled" in name]
    assert len(PAID) == 7
    monkeypatch.setattr(rows, "COMPENSATED_BY", 1)
    plain = copy.deepcopy(network)
    found = PAID["coherent OBS, refit"].begin(network, batches)(0.5, [])
    assert 0.4 < found["flops"] <= 0.5
    lp.prune(plain, lp.pruning_plan.plan_in_force(network))
    pairs = list(zip(network.parameters(), plain.parameters(), strict=True))
    assert all(refitted.shape == sliced.shape for refitted, sliced in pairs)
    assert not all(torch.equal(refitted, sliced) for refitted, sliced in pairs)


def test_statistics_of_a_rival_are_those_of_the_batches(network: nn.Module, batches):
    class Nothing:
        times, inside_blocks = 1, False

        def begin(self, model, batches):
            return lambda keep, optimizers: {"flops": keep}

    assert rows.Recalibrated(Nothing()).begin(network, batches)(0.5, []) == {"flops": 0.5}
    seen = network.features[0](batches[0][0]), network.features[0](batches[1][0])
    mean = torch.stack([each.mean((0, 2, 3)) for each in seen]).mean(0)
    torch.testing.assert_close(network.features[1].running_mean, mean)
