"""Agents of single layers: what they earn, what they find, and that nothing changes before they have learned."""

import math
from pathlib import Path
from typing import Any

import battery
import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.callbacks import LearnToPruneCallback
from lightning_prune.callbacks.learn_to_prune import reward
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.search.filter_agent import FilterNetwork, FilterSearch
from lightning_prune.search.width_bounds import WidthBounds


def make_callback(**changes: Any) -> LearnToPruneCallback:
    settings = {"keep": 0.5, "steps": 2, "round_to": 1, "updates": 3, "samples": 3}
    return LearnToPruneCallback(**{**settings, **changes})


def test_reward_by_hand() -> None:
    # 8 channels, 2 points accepted: half of the drop left and 4 channels; no drop; a drop of twice what is accepted.
    accuracy, kept = torch.tensor([0.79, 0.8, 0.76, 0.7, 0.81]), torch.tensor([4, 2, 4, 8, 1])
    expected = [0.5 * math.log(2), math.log(4), -math.log(2), 0.0, 1.5 * math.log(8)]
    torch.testing.assert_close(reward(accuracy, 0.8, 2.0, 8, kept), torch.tensor(expected))
    # Beyond the accepted drop, more removed earns less.
    assert reward(torch.tensor([0.7]), 0.8, 2.0, 8, torch.tensor([1])) < reward(
        torch.tensor([0.7]), 0.8, 2.0, 8, torch.tensor([7])
    )


def wide(channels: int = 8) -> ChannelGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, channels), nn.ReLU(), nn.Linear(channels, 2))
    return lp.trace(model, torch.zeros(1, 4))


def search_in(graph: ChannelGraph, keep: float = 0.3, **settings: Any) -> FilterSearch:
    bounds = WidthBounds(graph, CostModel(graph, "channels"), keep)
    widths = np.array([group.size for group in graph.groups.values()])
    return FilterSearch(graph, next(iter(graph.groups)), bounds, widths, **settings)


def test_finds_the_filters_that_are_needed() -> None:
    """A choice without filter 2 or 5 loses 10 points; the others are of no use."""
    search = search_in(wide(), keep=0.5, samples=8, learning_rate=0.02)
    search.limits = (1, 8)
    for _ in range(150):
        drawn, kept = search.draw(8)
        lacking = torch.tensor([len({2, 5} - set(channels.tolist())) for channels in kept])
        earned = reward(0.9 - 0.1 * lacking, 0.9, 5.0, 8, torch.tensor([len(channels) for channels in kept]))
        figures = search.learn(drawn, earned)
    assert "actor_loss" in figures
    assert search.draw(1, greedy=True)[1][0].tolist() == [2, 5]


@pytest.mark.parametrize("chance", [0.02, 0.5, 0.98])
def test_choices_stay_within_the_bounds_and_keep_what_is_most_probable(chance: float) -> None:
    graph = wide(20)
    search = search_in(graph, samples=2, keep=0.3)
    search.agent.policy.initial_logit = math.log(chance / (1 - chance))
    search.limits = (5, 9)
    drawn, kept = search.draw(50)
    logits = search.agent.policy.network(search.observation[None])[0]
    for choice, channels in zip(drawn, kept, strict=True):
        wished = set(choice.nonzero().flatten().tolist())
        assert len(channels) == min(max(len(wished), 5), 9)
        stay = set(channels.tolist())
        assert stay <= wished or stay >= wished
        changed, other = (wished - stay, stay) if stay <= wished else (set(range(20)) - stay, stay - wished)
        if changed and other:  # the least probable were left out, or the most probable taken in
            assert max(logits[list(changed)]) <= min(logits[list(other)])


def test_layers_are_dealt_out_in_order() -> None:
    names = list("abcde")
    for steps, expected in ((5, [1, 1, 1, 1, 1]), (2, [3, 2]), (3, [2, 2, 1]), (7, [1, 1, 1, 0, 1, 1, 0])):
        callback = make_callback(steps=steps)
        dealt = [callback.layers(names, step, step + 1) for step in range(steps)]
        assert [name for each in dealt for name in each] == names
        assert [len(each) for each in dealt] == expected
    assert make_callback(steps=5).layers(names, 1, 4) == ["b", "c", "d"]


class Watched(LearnToPruneCallback):
    """Compares the network before and after the agents have decided."""

    def make_plan(self, trainer: L.Trainer, graph: ChannelGraph, keep: float) -> tuple[PruningPlan, dict[str, Tensor]]:
        before = {name: value.clone() for name, value in graph.model.state_dict().items()}
        random = torch.get_rng_state()
        plan, scores = super().make_plan(trainer, graph, keep)
        assert all(torch.equal(before[name], value) for name, value in graph.model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert graph.model.training
        self.__dict__.setdefault("decided", []).append((trainer.current_epoch, list(plan.groups)))
        return plan, scores


@pytest.mark.filterwarnings("ignore:Prune . of .")
@pytest.mark.parametrize("finetune_steps", [0, 2])
def test_nothing_changes_until_an_agent_has_learned(finetune_steps: int, tmp_path: Path) -> None:
    callback = Watched(keep=0.5, steps=2, round_to=1, updates=2, samples=2, finetune_steps=finetune_steps)
    module, trainer = battery.train(tmp_path, callback, max_epochs=3)
    assert callback.decided == [(1, ["stem"]), (2, ["first"])]
    assert 0.4 < plan_in_force(module).budget["achieved"] <= 0.5
    assert trainer.callback_metrics["agent/reward"] == pytest.approx(callback.state.figures["reward"])


def test_a_copy_is_trained_for_some_steps(tmp_path: Path) -> None:
    """One step on one batch, worked out on a copy of our own."""
    found = []

    class Compare(LearnToPruneCallback):
        def decide(self, *which: Any) -> Tensor:
            graph = self.run.graph
            plan = graph.plan({"first": torch.arange(0, 24, 2)})
            twin = battery.ResidualClassifier().to(torch.float64)
            twin.load_state_dict(graph.model.state_dict())
            lp.prune(twin, plan)
            images, labels = self.run.training[0]
            optimizer = torch.optim.SGD(twin.train().parameters(), 0.3, momentum=0.9)
            nn.functional.cross_entropy(twin(images), labels).backward()
            optimizer.step()
            images, labels = battery.images(64).tensors
            expected = (twin.eval()(images.double()).argmax(1) == labels).double().mean()
            found.append((float(self.measure([plan])[0]), float(expected)))
            return super().decide(*which)

    callback = Compare(keep=0.5, updates=1, samples=2, finetune_steps=1, finetune_lr=0.3, candidate_batches=1)
    battery.train(tmp_path, callback, max_epochs=2, precision="64-true")
    assert found[0][0] == pytest.approx(found[0][1])


@pytest.mark.parametrize("finetune_steps", [0, 1])
def test_copies_do_not_wait_for_those_of_other_ranks(
    finetune_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object) -> None:
        raise AssertionError("waits for other ranks")

    class Alone(LearnToPruneCallback):
        def measure(self, *given: Any) -> Tensor:
            with monkeypatch.context() as patch:
                patch.setattr(nn.SyncBatchNorm, "forward", wait)
                return super().measure(*given)

    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(battery.ResidualClassifier())
    callback = Alone(keep=0.5, updates=1, samples=2, finetune_steps=finetune_steps)
    module, _ = battery.train(tmp_path, callback, module=synchronised, max_epochs=2)
    assert plan_in_force(module).budget["achieved"] <= 0.5


def test_convolutions_look_at_long_filters() -> None:
    kinds = [{type(layer) for layer in FilterNetwork(5, length).layers} for length in (24, 25)]
    assert nn.Conv2d not in kinds[0]
    assert nn.Conv2d in kinds[1]
    assert FilterNetwork(5, 700)(torch.randn(3, 3500)).shape == (3, 5)


def test_a_development_run(tmp_path: Path) -> None:
    module, _ = battery.train(tmp_path, make_callback(updates=1000), fast_dev_run=1)
    assert plan_in_force(module).budget["achieved"] <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "latency"}, "can be counted"),
        ({"accepted_drop": 0.0}, "points of accuracy"),
        ({"samples": 1}, "at least 2"),
        ({"updates": -1}, "at least 0"),
        ({"finetune_steps": 1, "compensate_candidates": "none", "candidate_batches": 0}, "raise candidate_batches"),
        ({"candidate_batches": 0}, "looks at data: raise candidate_batches"),
        ({"compensate_candidates": "folded"}, "compensate_candidates must be one of none"),
        ({"limit_batches": 0}, "limit_batches"),
        ({"agent_settings": {"baseline": "best"}}, "no baseline 'best'"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_callback(**changes)


def test_refuses_before_training_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"between .* can be kept"):
        battery.train(tmp_path, make_callback(keep=0.01))
    with pytest.raises(ValueError, match="LearnToPruneCallback measures on the validation split"):
        battery.train(tmp_path, make_callback(), limit_val_batches=0)


def test_settings_are_plain_values() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(LearnToPruneCallback, "callback")
    given = {"steps": 13, "accepted_drop": 1.0, "agent_settings": {"keep": 0.5}}
    callback = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert (callback.steps, callback.accepted_drop, callback.agent_settings) == (13, 1.0, {"keep": 0.5})
