"""The plan in force belongs to the network that was pruned, and a graph that is stale says so."""

import pickle
from pathlib import Path

import battery
import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery import mask, reshape

KEPT = {"0": torch.tensor([0, 2]), "2": torch.tensor([1, 2, 5])}
X = torch.zeros(1, 4)


class Named(nn.Module):
    """A network under whatever name, with a layer of its own before it."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name, self.first = name, nn.Linear(4, 4)
        self.add_module(name, network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(self.first(x))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = network(), network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def pruned_alone(alone: nn.Module) -> PruningPlan:
    lp.prune(alone, lp.trace(alone, X).plan(KEPT))
    return in_force(alone)


def in_force(model: nn.Module) -> PruningPlan:
    plan = plan_in_force(model)
    assert plan is not None
    return plan


def test_the_plan_goes_where_the_network_goes() -> None:
    alone, inside = network(), network()
    expected = pruned_alone(alone)
    wrapper = Named("core", inside)
    graph = lp.trace(wrapper, X)
    lp.prune(wrapper, graph.plan({f"core.{name}": kept for name, kept in KEPT.items()}))
    assert in_force(inside) == expected  # as if it had been pruned alone
    for pruned in (alone, inside):
        other = Named("body", Named("net", pruned))
        plan = in_force(other)
        assert plan.widths == {"body.net.0": 2, "body.net.2": 3}
        assert plan.shapes == {f"body.net.{name}": shape for name, shape in expected.shapes.items()}
        fresh = Named("body", Named("net", network()))
        lp.prune(fresh, plan)
        fresh.load_state_dict(other.state_dict())
        assert in_force(fresh) == plan
        assert plan_in_force(other.first) is None
        assert in_force(other) is in_force(other), "joined once"
    assert in_force(pickle.loads(pickle.dumps(Named("x", alone)))).widths == {"x.0": 2, "x.2": 3}


def test_each_network_keeps_its_own_plan() -> None:
    """Pruned in one go or apart, taken out of one model and put into another."""
    both = Sum()
    graph = lp.trace(both, X)
    lp.prune(both, graph.plan({"left.0": KEPT["0"], "right.2": KEPT["2"]}))
    left, right = both.left, both.right
    assert in_force(left).widths == {"0": 2}
    assert in_force(right).widths == {"2": 3}
    assert in_force(nn.ModuleList([right, network()])).widths == {"0.2": 3}
    lp.prune(left, lp.trace(left, X).plan({"2": KEPT["2"]}))
    assert in_force(both).widths == {"left.0": 2, "left.2": 3, "right.2": 3}
    lp.prune(both, graph.plan({"right.0": KEPT["0"]}))  # the graph is about the original model, hence good
    assert in_force(right).widths == {"2": 3, "0": 2}
    reshape(both, None)
    assert [plan_in_force(module) for module in (both, left, right)] == [None] * 3


def test_a_network_under_two_names_has_the_plan_under_the_first() -> None:
    alone = network()
    pruned_alone(alone)
    model = nn.ModuleDict({"tied": alone[2], "net": alone, "again": alone})
    plan = in_force(model)
    assert plan.widths == {"net.0": 2, "tied": 3}
    assert set(plan.shapes) <= set(dict(model.named_parameters()))
    fresh = network()
    other = nn.ModuleDict({"tied": fresh[2], "net": fresh, "again": fresh})
    lp.prune(other, plan)
    other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("change", ["replaced", "taken away"])
def test_a_stale_graph_is_told_in_one_sentence(change: str) -> None:
    model = network()
    graph = lp.trace(model, X)
    pruned_alone(model)
    lp.criteria.magnitude(graph)  # pruned, not stale
    if change == "replaced":
        model[2], expected = nn.Linear(6, 6), r"'2.weight' has shape \(6, 6\) now, where pruning has left \(3, 2\)"
    else:
        model[4], expected = nn.Identity(), "'4.weight' is not in the model any more"
    batch = (X, torch.tensor([0]))
    runs = [
        lambda: lp.criteria.magnitude(graph),
        lambda: lp.criteria.group_magnitude(graph),
        lambda: evaluate_candidates(graph, [{}], [batch]),
        lambda: mask(graph, graph.plan({})),
    ]
    for run in runs:
        with pytest.raises(ValueError, match=rf"^The graph is stale: {expected}; trace the model again\.$"):
            run()


class Wrapper(L.LightningModule):
    def __init__(self, name: str = "net", given: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="given")
        self.name = name
        self.add_module(name, given or battery.ResidualClassifier())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("first", ["alone", "in another module"])
def test_checkpoints_of_another_module_hold_the_plan(first: str, tmp_path: Path) -> None:
    core = battery.ResidualClassifier()
    if first == "alone":
        graph = lp.trace(core, torch.zeros(1, 1, 8, 8))
        lp.prune(core, graph.plan({name: torch.arange(group.size // 2) for name, group in graph.groups.items()}))
    else:
        battery.train(tmp_path / "1", battery.make_callback("magnitude"), module=Wrapper("first", core), max_epochs=4)
    expected = in_force(core)
    module, trainer = battery.train(tmp_path / "2", module=Wrapper("second", core), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lp.load_pruned(Wrapper, tmp_path / "last.ckpt")
    assert battery.differences(module, loaded) == []
    assert in_force(loaded).widths == {f"second.{name}": width for name, width in expected.widths.items()}
    assert in_force(loaded.second) == expected
    resumed, _ = battery.train(tmp_path / "3", module=Wrapper("second"), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert in_force(resumed.second) == expected


@pytest.mark.filterwarnings("ignore:Prune . of .")
def test_a_callback_goes_on_from_what_was_pruned_before(tmp_path: Path) -> None:
    """Budgets are fractions of the original network, whoever has pruned it first."""
    core = battery.ResidualClassifier()
    graph = lp.trace(core, torch.zeros(1, 1, 8, 8))
    lp.prune(core, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.8, round_to=2))
    before = in_force(core)
    module, _ = battery.train(tmp_path, battery.make_callback("magnitude"), module=Wrapper("net", core), max_epochs=4)
    after = in_force(module.net)
    assert 0.4 < in_force(module).budget["achieved"] <= 0.5
    for name, group in after.groups.items():
        assert set(group.kept) <= set(before.groups[name].kept)
