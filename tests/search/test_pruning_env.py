"""The bounds that keep every episode within its budget, what agents see, and the environment of gymnasium."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from engine import counted_flops, randomised
from gymnasium.utils.env_checker import check_env
from shortened import ordinary
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import build_network
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.search import make_agent
from lightning_prune.search.episodes import PruningEpisodes, play
from lightning_prune.search.policy_search import PolicySearch
from lightning_prune.search.pruning_env import PruningEnv
from lightning_prune.search.pruning_problem import OBSERVATION_SIZE, PruningProblem, accuracy_of


def convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 8)
        self.inner = nn.ModuleList(convolution(8, 12) for _ in range(2))
        self.outer = nn.ModuleList(convolution(12, 8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(inner(x))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(convolution(4 + 6 * i, 6) for i in range(3))
        self.stem, self.head = convolution(3, 4), nn.Linear(22, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


def plain(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


NETWORKS: dict[str, Any] = {
    "residual": Residual,
    "vgg": lambda: plain(*(convolution(i, o, s) for i, o, s in ((3, 8, 1), (8, 16, 2), (16, 24, 1))), width=24),
    "mobilenet": lambda: plain(
        convolution(3, 8), convolution(8, 8, 2, groups=8), convolution(8, 16, 1, 1), convolution(16, 16, 1, groups=16),
        convolution(16, 24, 1, 1), width=24,
    ),
    "densenet": Dense,
    "grouped": lambda: plain(convolution(3, 8), convolution(8, 16, groups=4), convolution(16, 12, 2), width=12),
}  # fmt: skip


def traced(name: str) -> ChannelGraph:
    torch.manual_seed(0)
    return lp.trace(randomised(NETWORKS[name]()).eval(), torch.zeros(1, 3, 8, 8))


def sequences(problem: PruningProblem, n: int, generator: torch.Generator) -> np.ndarray:
    """Run episodes of random actions; half of the sequences lean to one side, most of all to prune all or nothing."""
    episodes, lean = PruningEpisodes(problem, n), 4 * torch.randn(n, 1, generator=generator)
    while not episodes.ended:
        assert bool((episodes.view.low <= episodes.view.high).all())
        episodes.step((lean + torch.randn(n, 1, generator=generator)).sigmoid())
    return episodes.widths


@pytest.mark.parametrize("name", NETWORKS)
def test_no_sequence_of_actions_misses_the_budget(name: str) -> None:
    graph, generator = traced(name), torch.Generator().manual_seed(1)
    for number in range(20):
        metric, round_to = ("flops", "params", "channels")[number % 3], (1, 2, 4)[number % 4 % 3]
        cap = (0.8, 1.0)[number % 2]
        least = lp.planning.reachable(graph, metric, round_to, cap=cap)
        keep = least + (1 - least) * float(torch.rand((), generator=generator))
        problem = PruningProblem(graph, keep=keep, metric=metric, round_to=round_to, cap=cap)
        cost = CostModel(graph, metric)
        for widths in sequences(problem, 100, generator):
            assert cost.of(widths) <= keep * cost.original
            assert (widths >= (1 - cap) * cost.sizes - 1e-6).all()
            assert spends_what_it_may(problem, widths)


def spends_what_it_may(problem: PruningProblem, widths: np.ndarray) -> bool:
    """Tell whether nothing more was pruned than was asked: some group, one step wider, would miss the budget."""
    costs = []
    for group, allowed in enumerate(problem.bounds.allowed):
        wider = widths.copy()
        wider[group] = next((width for width in allowed if width > widths[group]), widths[group])
        costs.append(problem.cost.of(wider))
    return max(costs) > problem.bounds.budget or (widths == problem.bounds.most).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_are_the_tightest(name: str) -> None:
    """By brute force: every width within the bounds can be completed, and no other width."""
    graph = traced(name)
    problem = PruningProblem(graph, keep=0.5, round_to=2, cap=0.8)
    cost, bounds = problem.cost, problem.bounds
    for widths in sequences(problem, 20, torch.Generator().manual_seed(0)):
        for group in range(len(widths)):
            narrowest, widest = bounds.after(widths[:group])
            for width in bounds.allowed[group]:
                cheapest = cost.of(np.concatenate([widths[:group], [width], bounds.least[group + 1 :]]))
                dearest = cost.of(np.concatenate([widths[:group], [width], bounds.most[group + 1 :]]))
                assert (width <= widest) == (cheapest <= bounds.budget)
                assert width >= narrowest or dearest < bounds.budget  # else it would be allowed to prune more
                assert width <= narrowest or dearest > bounds.budget or width > widest


@pytest.mark.parametrize("name", NETWORKS)
def test_many_episodes_have_the_bounds_of_each(name: str) -> None:
    """By brute force, width by width: the widest that fits, and the allowed width that is nearest to a wish."""
    generator = torch.Generator().manual_seed(1)
    problem = PruningProblem(traced(name), keep=0.5, round_to=2)
    cost, bounds = problem.cost, problem.bounds
    played = np.array(sequences(problem, 7, generator))
    for group in range(len(problem)):
        narrowest, widest = bounds.after_each(played[:, :group])
        wished = torch.rand(7, generator=generator, dtype=torch.float64).numpy() * problem.sizes[group]
        nearest = bounds.nearest_of_each(group, wished, narrowest, widest)
        for episode, widths in enumerate(played):
            for found, later in ((narrowest, bounds.most), (widest, bounds.least)):
                decided = [*widths[:group]]
                fitting = [
                    width
                    for width in bounds.allowed[group]
                    if cost.of(np.array([*decided, width, *later[group + 1 :]])) <= bounds.budget
                ]
                assert found[episode] == max(fitting, default=bounds.allowed[group][0])
            within = [one for one in bounds.allowed[group] if narrowest[episode] <= one <= widest[episode]]
            assert nearest[episode] == min(within, key=lambda one: (abs(one - wished[episode]), one))


def test_plans_cost_what_is_counted_on_the_pruned_network() -> None:
    graph = traced("residual")
    problem = PruningProblem(graph, keep=0.4)
    before = counted_flops(graph.model, torch.zeros(1, 3, 8, 8))
    (widths,) = sequences(problem, 1, torch.Generator().manual_seed(2))
    plan = problem.plan(widths)
    for name, group in plan.groups.items():
        norms = problem.scores[name]
        assert norms[group.channels].min() >= norms[group.pruned].max() if len(group.pruned) else True
    lp.prune(graph.model, plan)
    after = counted_flops(graph.model, torch.zeros(1, 3, 8, 8))
    assert after / before == pytest.approx(plan.budget["achieved"])
    assert after / before <= 0.4


def test_a_pruned_network_goes_on_from_what_is_kept() -> None:
    graph = traced("vgg")
    first = PruningProblem(graph, keep=0.6)
    lp.prune(graph.model, first.plan(sequences(first, 1, torch.Generator().manual_seed(0))[0]))
    second = PruningProblem(graph, keep=0.3)
    plan = second.plan(sequences(second, 1, torch.Generator().manual_seed(1))[0])
    lp.prune(graph.model, plan)
    assert plan.budget["achieved"] <= 0.3
    with pytest.raises(ValueError, match="cannot be reached"):
        PruningProblem(graph, keep=0.01)


def test_what_is_seen_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, bias=False), nn.Conv2d(4, 8, 1, bias=False), nn.Flatten())
    model.append(nn.Linear(8 * 9, 2, bias=False))
    graph = lp.trace(model, torch.zeros(1, 1, 8, 8))
    # FLOPs: 9 positions x (9 x 1 x 4 + 4 x 8) + 72 x 2 = 324 + 288 + 144 = 756
    problem = PruningProblem(graph, keep=0.5, cap=0.75)
    episodes = PruningEpisodes(problem, 1)
    # least: 1 and 2 channels, 9 x (9 + 2) + 18 x 2 = 135
    first = [0, 1 / 4, 4 / 8, 2 / 2, 3 / 3, 612 / 756, 135 / 756, 621 / 756, 0]
    torch.testing.assert_close(episodes.view.observation, torch.tensor([first]))
    episodes.step(torch.tensor([[0.25]]))
    # 3 channels are kept: 9 x (27 + 6) + 36 = 333 at least, 9 x (27 + 24) + 144 = 603 at most
    second = [1 / 2, 4 / 4, 8 / 8, 1 / 2, 1 / 3, 432 / 756, 333 / 756, 270 / 756, 0.25]
    torch.testing.assert_close(episodes.view.observation, torch.tensor([second]))
    # 243 + 45 n of 378 may be spent: 3 of 8 channels; to prune more is not asked for
    assert (float(episodes.view.low), float(episodes.view.high)) == (0.625, 0.625)


def test_observations_are_in_range_and_actions_are_those_executed() -> None:
    graph = traced("densenet")
    problem, agent = PruningProblem(graph, keep=0.5), make_agent("random", OBSERVATION_SIZE, 1, 0)
    widths, transitions = play(problem, agent, 30)
    for step, transition in enumerate(transitions):
        for seen in (transition.observation, transition.next_observation):
            assert seen.shape == (30, OBSERVATION_SIZE)
            assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
        assert bool(((transition.action >= transition.low) & (transition.action <= transition.high)).all())
        executed = 1 - torch.from_numpy(widths[:, step] / problem.sizes[step])
        off = (executed - transition.action.flatten()).abs()
        assert float(off.max()) <= 0.5 / problem.sizes[step] + 1e-6
        assert transition.terminated == (step == len(problem) - 1)
    torch.testing.assert_close(transitions[3].observation, transitions[2].next_observation)


def count_channels(plans: list[PruningPlan]) -> Tensor:
    """Reward plans for what they keep of the first group."""
    return torch.tensor([len(next(iter(plan.groups.values())).kept) / 8 for plan in plans])


def test_gymnasium_accepts_the_environment() -> None:
    env = PruningEnv(traced("residual"), count_channels, keep=0.5)
    check_env(env, skip_render_check=True)
    env.reset()
    total, ended = 0.0, False
    while not ended:
        _, reward, ended, truncated, info = env.step(env.action_space.sample())
        total += reward
        assert not truncated
    assert total == len(info["plan"].groups["stem.0"].kept) / 8


def test_rewards_are_accuracies_of_compensated_networks() -> None:
    graph = traced("vgg")
    images, labels = torch.randn(60, 3, 8, 8), torch.randint(5, (60,))
    settings: dict[str, Any] = {"compensate": "fold", "compensate_batches": [(images, labels)]}
    split = list(zip(images.split(25), labels.split(25), strict=True))
    problem = PruningProblem(graph, keep=0.5)
    plans = [problem.plan(widths) for widths in sequences(problem, 4, torch.Generator().manual_seed(0))]
    measured = accuracy_of(graph, split, **settings)(plans)
    for plan, reward in zip(plans, measured, strict=True):
        pruned = lp.trace(randomised(NETWORKS["vgg"]()), torch.zeros(1, 3, 8, 8)).model
        pruned.load_state_dict(graph.model.state_dict())
        lp.prune(pruned, plan, compensate="fold", batches=[images])
        expected = (pruned.eval()(images).argmax(1) == labels).double().mean()
        assert float(reward) == pytest.approx(float(expected))


def test_stable_baselines_trains_on_it() -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = gymnasium.wrappers.RecordEpisodeStatistics(PruningEnv(traced("vgg"), count_channels, keep=0.5))
    agent = stable_baselines3.PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, device="cpu", seed=0)
    agent.learn(64)
    action, _ = agent.predict(env.reset()[0], deterministic=True)
    assert env.action_space.contains(action)
    assert len(env.return_queue) == 64 // 3


def closeness(problem: PruningProblem, widths: np.ndarray) -> Tensor:
    """Reward episodes that take from the late groups what the budget asks for."""
    wanted = np.where(np.arange(len(problem)) < len(problem) // 2, 1.0, 0.3)
    return torch.from_numpy(-np.square(widths / problem.sizes - wanted).sum(1))


@pytest.mark.parametrize(
    "name", ordinary(["sac", "ppo-clip", "ppo-kl", "ppo-cim", "reinforce"], "ppo-cim", "reinforce")
)
def test_agents_beat_random_search(name: str) -> None:
    problem = PruningProblem(traced("residual"), keep=0.5)

    def last(agent: str, **settings: Any) -> float:
        search = PolicySearch(agent, steps=len(problem), episodes=10, agent_updates=60, **settings)
        rewards = []
        for _ in range(16):
            widths = search.explore(problem)
            rewards.append(closeness(problem, widths))
            search.learn(rewards[-1])
        return float(torch.cat(rewards[-4:]).mean())

    small = {"agent_settings": {"hidden_sizes": (64, 64), "actor_learning_rate": 1e-3}} if name == "sac" else {}
    found, random = last(name, **small), last("random")
    assert found > 0.6 * random  # both are below 0


@pytest.mark.parametrize("name", ["ppo-clip", "ppo-kl", "ppo-cim", "reinforce"])
def test_defaults_find_the_one_group_that_matters_in_a_deep_network(name: str) -> None:
    """As on a trained ResNet-20, where the first group does most of the damage; draws that are clipped hide it."""
    problem = PruningProblem(lp.trace(build_network("resnet20").eval(), torch.zeros(1, 3, 32, 32)), keep=0.5)
    harm = np.where(np.arange(len(problem)) == 0, 4.0, 0.5)

    def last(agent: str) -> float:
        search, rewards = PolicySearch(agent, steps=len(problem), episodes=10), []
        for _ in range(16):
            damage = np.square(1 - search.explore(problem) / problem.sizes) @ harm
            rewards.append(torch.from_numpy(1 / (1 + np.exp(damage - 2))))
            search.learn(rewards[-1])
        return float(torch.cat(rewards[-4:]).mean())

    assert last(name) > last("random") + 0.03


def test_episodes_earn_at_the_end_or_at_every_step() -> None:
    problem, given = PruningProblem(traced("vgg"), keep=0.5), torch.tensor([0.2, 0.4])
    for rewarded, expected in (("every_step", [1, 1, 1]), ("last_step", [0, 0, 1])):
        search = PolicySearch("sac", steps=3, episodes=2, rewarded=rewarded, environment_size=2)
        search.explore(problem)
        search.learn(given)
        rows = search.agent.replay_buffer.layout.unpack(search.agent.replay_buffer._rows[:6])
        standard = (given - given.mean()) / given.std()
        torch.testing.assert_close(rows.reward, torch.cat([flag * standard for flag in expected]))
        rows = search.environment.replay_buffer.layout.unpack(search.environment.replay_buffer._rows[:6])
        torch.testing.assert_close(rows.reward, given.repeat(3))
        assert rows.terminated.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("agent", ["ppo-clip", "reinforce"])
def test_an_agent_learns_from_what_it_saw_when_it_acted(agent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment model moves on only after that, or the old policy would be another one."""
    problem = PruningProblem(traced("residual"), keep=0.5)
    search = PolicySearch(agent, steps=len(problem), episodes=4, agent_updates=2, environment_size=4)
    seen, update = [], search.agent.update

    def note() -> dict[str, float]:
        seen.append(search.environment.representation(torch.tensor(0)))
        return update()

    monkeypatch.setattr(search.agent, "update", note)
    for _ in range(2):
        search.explore(problem)
        seen.append(search.environment.representation(torch.tensor(0)))
        search.learn(torch.rand(4))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[3], seen[4])
    assert not torch.equal(seen[0], seen[3])


def test_scores_that_are_no_numbers_are_refused() -> None:
    graph = traced("residual")
    with torch.no_grad():
        next(graph.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"'stem\.0\.weight' holds NaN"):
        PruningProblem(graph, keep=0.5)
