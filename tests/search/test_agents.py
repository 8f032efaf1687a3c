"""What every agent must do: respect bounds, resume to the bit, do not touch global random numbers, and learn."""

import copy
import io
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shortened import ordinary
from torch import Tensor

from lightning_prune.rl import Agent, AgentSettings, EnvironmentModel, Transition
from lightning_prune.search import AGENTS, make_agent

SMALL: dict[str, dict[str, Any]] = {
    "sac": {"hidden_sizes": (16, 16), "batch_size": 16, "buffer_size": 60, "learning_starts": 20, "ent_coef": "auto"},
    **{
        name: {"hidden_sizes": (16, 16), "rollout_size": 24, "batch_size": 8, "n_epochs": 2}
        for name in AGENTS
        if "ppo" in name
    },
    "reinforce": {"hidden_sizes": (16, 16), "n_episodes": 6, "policy": "gaussian"},
    "random": {},
}
for name in ("ppo-cim", "ppo-cim-1", "ppo-cim-2"):
    SMALL[name]["trust_region"] = {"target": 1e-4}
EPISODE = 3


def small(name: str, seed: int = 0) -> Agent:
    return make_agent(name, observation_size=2, action_size=2, seed=seed, **SMALL[name])


def play(agent: Agent, steps: range, bounds: torch.Generator) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Play episodes of three steps in which two bounds change from step to step."""
    actions, figures = [], []
    for step in steps:
        observation = torch.tensor([step % EPISODE / EPISODE, 0.5])
        low = 0.4 * torch.rand(2, generator=bounds)
        high = low + 0.5 * torch.rand(2, generator=bounds)
        action = agent.act(observation, low, high, epoch=step)
        following = torch.tensor([(step + 1) % EPISODE / EPISODE, 0.5])
        reward = -(action - 0.3).square().sum().item()
        ended = step % EPISODE == EPISODE - 1
        agent.observe(Transition(observation, action, reward, following, ended, low=low, high=high, epoch=step))
        actions.append(action)
        figures.append(agent.update())
    return actions, figures


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("name", AGENTS)
def test_a_resumed_agent_goes_on_to_the_same_bits(name: str) -> None:
    unbroken, bounds = small(name), torch.Generator().manual_seed(1)
    play(unbroken, range(50), bounds)  # in the middle of an episode, of a rollout, and before the buffer is full
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    resumed, same_bounds = small(name, seed=99), bounds.clone_state()
    resumed.load_state_dict(state)
    assert same(play(unbroken, range(50, 120), bounds), play(resumed, range(50, 120), same_bounds))
    assert same(unbroken.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sac", "actor critics targets actor_optimizer critic_optimizer temperature memory"),
        ("ppo-kl", "policy critic optimizer trust_region memory"),
        ("reinforce", "policy optimizer memory"),
        ("random", "episodes"),
    ],
)
def test_states_have_the_keys_of_earlier_checkpoints(name: str, keys: str) -> None:
    agent = small(name)
    play(agent, range(23), torch.Generator().manual_seed(1))  # an episode is running
    state = agent.state_dict()
    assert set(state) == {*keys.split(), "generator", "exploration"}
    if name == "sac":
        assert set(state["temperature"]) == {"log_value", "optimizer"}
        assert {"0.weight", "4.bias"} <= set(state["actor"])
        assert {"0.0.weight", "1.4.bias"} <= set(state["critics"])
    if name == "reinforce":
        assert set(state["memory"]) == {"running", "ended"}
        assert set(state["memory"]["running"][0]) == {"observation", "action", "low", "high", "reward", "epoch"}


@pytest.mark.parametrize("name", AGENTS)
def test_a_state_does_not_change_while_the_agent_goes_on(name: str) -> None:
    agent, bounds = small(name), torch.Generator().manual_seed(1)
    play(agent, range(49), bounds)
    state = agent.state_dict()
    before = copy.deepcopy(state)
    play(agent, range(49, 80), bounds)
    other = small(name)
    other.load_state_dict(state)
    play(other, range(49, 80), bounds)
    assert same(before, state)


@pytest.mark.parametrize("name", AGENTS)
def test_same_seed_same_bits_and_global_random_numbers_untouched(name: str) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))  # which must not matter
        before = torch.get_rng_state()
        agent = small(name)
        played = play(agent, range(60), torch.Generator().manual_seed(1))
        assert torch.equal(before, torch.get_rng_state())
        runs.append((played, agent.state_dict()))
    assert same(*runs)
    assert not same(play(small(name, seed=1), range(6), torch.Generator().manual_seed(1)), runs[0][0])


def test_the_environment_model_resumes_to_the_same_bits_with_global_random_numbers_untouched() -> None:
    def model(seed: int) -> EnvironmentModel:
        return EnvironmentModel(2, 1, seed, epochs=4, representation_size=8, hidden_sizes=(8,), batch_size=4)

    def learn(model: EnvironmentModel, numbers: torch.Generator) -> list[dict[str, float]]:
        for epoch in range(4):
            seen, action = torch.rand(2, generator=numbers), torch.rand(1, generator=numbers)
            model.observe(Transition(seen, action, seen.sum(), seen, terminated=True, epoch=epoch))
        return [model.update() for _ in range(5)]

    before = torch.get_rng_state()
    unbroken, numbers = model(0), torch.Generator().manual_seed(0)
    learn(unbroken, numbers)
    resumed = model(1)
    resumed.representation(torch.tensor(0))  # a table that is out of date after loading
    resumed.load_state_dict(unbroken.state_dict())
    epochs = torch.arange(4)
    assert torch.equal(unbroken.representation(epochs), resumed.representation(epochs))
    assert learn(unbroken, numbers.clone_state()) == learn(resumed, numbers)
    assert torch.equal(unbroken.representation(epochs), resumed.representation(epochs))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", AGENTS)
def test_every_action_is_within_its_bounds(name: str, greedy: bool) -> None:
    agent = small(name)
    play(agent, range(30), torch.Generator().manual_seed(1))  # beyond random actions and first updates
    low = torch.rand(500, 2) * 0.9
    high = low + (1 - low) * torch.rand(500, 2)
    high[:50] = low[:50]
    actions = agent.act(torch.rand(500, 2), low, high, greedy)
    assert actions.shape == (500, 2)
    assert (actions >= low).all()
    assert (actions <= high).all()


@pytest.mark.parametrize("name", AGENTS)
def test_bounds_with_several_rows_draw_several_actions_for_one_observation(name: str) -> None:
    agent = small(name)
    play(agent, range(30), torch.Generator().manual_seed(1))
    actions = agent.act([0.1, 0.2], low=torch.zeros(50, 2), high=[1.0, 1.0])
    assert actions.shape == (50, 2)
    assert len(actions.unique(dim=0)) > 25


@pytest.mark.parametrize("name", AGENTS)
def test_ranks_that_explore_differently_and_observe_the_same_remain_equal(name: str) -> None:
    ranks = [small(name) for _ in range(2)]
    for episode in range(40):
        player = ranks[episode % 3 == 0]
        player.explore_from(1000 + episode)
        steps = []
        for step in range(EPISODE):
            action = player.act([step / EPISODE, 0.5])
            steps.append(Transition([step / EPISODE, 0.5], action, -action.sum(), [0.0, 0.5], step == EPISODE - 1))
        for agent in ranks:
            for step in steps:
                agent.observe(step)
                agent.update()
    states = [agent.state_dict() for agent in ranks]
    for state in states:
        del state["exploration"]
    assert same(*states)


@dataclass(kw_only=True)
class MiddleSettings(AgentSettings):
    share: float = 0.5


class Middle(Agent):
    """An agent from elsewhere, which does not learn."""

    settings_type = MiddleSettings
    settings: MiddleSettings

    def observe(self, transition: Transition) -> None: ...

    def update(self) -> dict[str, float]:
        return {}

    def _choose(self, observation: Any, low: Any, high: Any, greedy: bool, epoch: int) -> Any:
        return (low + self.settings.share * (high - low)).expand(*observation.shape[:-1], -1)

    def _stateful(self) -> dict[str, Any]:
        return {}


def test_agents_from_elsewhere_are_found_by_name_and_by_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGENTS, "middle", Middle)
    for name in ("middle", f"{__name__}.Middle"):
        assert make_agent(name, 1, 1, 0, high=2.0, share=0.25).act([0.0]).item() == 0.5
    with pytest.raises(ValueError, match=r"has no setting 'rollout_size'; it has share, low, high"):
        make_agent("middle", 1, 1, 0, rollout_size=3)
    with pytest.raises(ValueError, match=r"'math.pi' is no agent: give a subclass of lightning_prune.rl.Agent."):
        make_agent("math.pi", 1, 1, 0)
    with pytest.raises(ValueError, match=r"'nowhere.Mine' cannot be imported \(No module named 'nowhere'\): check"):
        make_agent("nowhere.Mine", 1, 1, 0)


@pytest.mark.parametrize("name", AGENTS)
def test_one_observation_is_one_action(name: str) -> None:
    agent = small(name)
    assert agent.act([0.1, 0.2]).shape == (2,)
    assert agent.act([[0.1, 0.2]], greedy=True).shape == (1, 2)


LEARNERS: dict[str, dict[str, Any]] = {
    "sac": {"ent_coef": 0.02, "actor_learning_rate": 3e-3, "learning_starts": 64, "hidden_sizes": (32, 32)},
    **{name: {"rollout_size": 64, "learning_rate": 3e-3, "policy": {"name": "gaussian", "initial_std": 0.5}}
       for name in AGENTS if "ppo" in name},
    "reinforce": {"policy": {"name": "gaussian", "initial_std": 0.5}, "n_episodes": 64, "learning_rate": 2e-2},
}  # fmt: skip


@pytest.mark.parametrize("name", ordinary(LEARNERS, "sac", "ppo-cim", "reinforce"))
def test_agents_learn_an_action_that_depends_on_the_observation(name: str) -> None:
    """One step per episode, reward -(action - observation)^2: uniform actions earn -1/6 on average."""
    agent = make_agent(name, 1, 1, 0, **LEARNERS[name])
    numbers = torch.Generator().manual_seed(0)
    for _ in range(40):
        seen = torch.rand(64, 1, generator=numbers)
        action = agent.act(seen)
        agent.observe(Transition(seen, action, -(action - seen).square().squeeze(1), seen, [True] * 64))
        for _ in range(8 if name == "sac" else 1):
            agent.update()
    seen = torch.rand(1000, 1, generator=numbers)
    earned = -(agent.act(seen, greedy=True) - seen).square().mean().item()
    assert earned > -0.01


def test_random_search_repeats_its_best_episode() -> None:
    agent = make_agent("random", 1, 1, 0)
    for _ in range(300):
        for step in (0.0, 1.0):
            action = agent.act([step])
            reward = -abs(action.item() - (0.2 if step == 0 else 0.7))
            agent.observe(Transition([step], action, reward, [1.0], terminated=step == 1.0))
    best = agent.update()["best_return"]
    actions = [agent.act([step], greedy=True).item() for step in (0.0, 1.0)]
    assert best > -0.1
    assert -abs(actions[0] - 0.2) - abs(actions[1] - 0.7) == pytest.approx(best, abs=1e-6)


def test_random_search_that_goes_back_forgets_what_came_after() -> None:
    def episode(agent: Any, reward: float) -> None:
        agent.observe(Transition([0.0], [reward], reward, [0.0], terminated=True))

    agent = make_agent("random", 1, 1, 0)
    episode(agent, 1.0)
    early = agent.state_dict()
    episode(agent, 2.0)
    agent.load_state_dict(early)
    assert agent.update()["best_return"] == 1.0


def test_random_search_tells_the_episodes_of_several_environments_apart() -> None:
    agent = make_agent("random", 1, 1, 0)
    seen = torch.zeros(2, 1)
    agent.observe(Transition(seen, [[0.1], [0.9]], [1.0, 3.0], seen, terminated=[False, True]))
    agent.observe(Transition(seen, [[0.2], [0.8]], [1.5, 0.0], seen, terminated=[True, False]))
    assert agent.update() == {"best_return": 3.0}
    assert agent.act([0.0], greedy=True).item() == pytest.approx(0.9)


def test_wrong_uses_are_told() -> None:
    with pytest.raises(ValueError, match="no agent 'dqn'"):
        make_agent("dqn", 1, 1, 0)
    with pytest.raises(ValueError, match="no setting 'rollout_size'; it has hidden_sizes"):
        make_agent("sac", 1, 1, 0, rollout_size=3)
    with pytest.raises(ValueError, match="`low` must be below `high`"):
        make_agent("sac", 1, 1, 0, low=1.0)
    with pytest.raises(ValueError, match="both `context` and `context_size`"):
        make_agent("sac", 1, 1, 0, context_size=3)
    with pytest.raises(ValueError, match="has no setting 'sigm'; it has coefficient, sigma, target"):
        make_agent("ppo-cim", 1, 1, 0, trust_region={"sigm": 1.0})
    for given in ("kl", {"name": "kl"}):
        with pytest.raises(ValueError, match="names its trust region"):
            make_agent("ppo-clip", 1, 1, 0, trust_region=given)
    with pytest.raises(ValueError, match="both finite"):
        make_agent("sac", 1, 1, 0, high=float("inf"))
    with pytest.raises(ValueError, match="no policy 'beta'"):
        make_agent("ppo-clip", 1, 1, 0, policy="beta")
    agent = make_agent("sac", 2, 1, 0)
    with pytest.raises(ValueError, match="has 2 numbers"):
        agent.act([0.1])
    with pytest.raises(ValueError, match="An observation has a number that is not finite"):
        agent.act([0.1, float("nan")])
    for name in ("sac", "reinforce"):
        with pytest.raises(ValueError, match="not finite"):
            make_agent(name, 2, 1, 0).observe(Transition([0.1, 0.2], [0.5], float("nan"), [0.1, 0.2], True))
    with pytest.raises(ValueError, match="No action is allowed"):
        agent.act([0.1, 0.2], low=[0.7], high=[0.3])
    with pytest.raises(ValueError, match="'observation' of a transition"):
        agent.observe(Transition([0.1], [0.5], 0.0, [0.1], terminated=True))
    with pytest.raises(ValueError, match="kind of agent"):
        agent.load_state_dict(make_agent("random", 2, 1, 0).state_dict())
    other = make_agent("sac", 2, 1, 0, buffer_size=3)
    for _ in range(5):
        other.observe(Transition([0.1, 0.2], [0.5], 0.0, [0.1, 0.2], terminated=True))
    state = other.state_dict()
    with pytest.raises(ValueError, match="load it with the same sizes"):
        agent.load_state_dict(state)


def test_gymnasium_is_not_needed() -> None:
    code = "import lightning_prune.search, sys; assert not {'gymnasium', 'stable_baselines3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
