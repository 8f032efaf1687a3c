"""Searches without an agent, by hand-worked cases and against plain loops that do the same."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from engine import counted_flops
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.rl import Agent
from lightning_prune.search import AGENTS, CONTROLS, make_search
from lightning_prune.search.controls import Evolution, Greedy, Halving, SkipWhole
from lightning_prune.search.episodes import Residual
from lightning_prune.search.filling import filled
from lightning_prune.search.policy_search import PolicySearch
from lightning_prune.search.pruning_problem import PruningProblem

NAMES = [*CONTROLS, "random", "ppo-clip"]


class Blocks(nn.Module):
    """A stream that two blocks add to, and a layer before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(inner(x).relu())
        return self.head(self.last(x).mean((2, 3)))


X = torch.zeros(1, 3, 4, 4)


@pytest.fixture(scope="module")
def problem() -> PruningProblem:
    return PruningProblem(lp.trace(Blocks(), X), keep=0.5)


@pytest.fixture
def chain() -> PruningProblem:
    layers = nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False)
    return PruningProblem(lp.trace(nn.Sequential(*layers), torch.zeros(1, 1)), keep=0.5, metric="params")


def worth(problem: PruningProblem, widths: np.ndarray) -> Tensor:
    """Reward groups unlike, with diminishing returns: the early ones most."""
    values = 1.0 / (1 + np.arange(len(problem)))
    return torch.from_numpy(np.sqrt(widths / problem.sizes) @ values)


def name_of(search: Any) -> str:
    return next((name for name, kind in CONTROLS.items() if type(search) is kind), "agent")


def played(search: Any, problem: PruningProblem, evaluations: int = 60) -> list[list[int]]:
    rows: list[list[int]] = []
    while len(rows) < evaluations:
        widths = search.explore(problem)
        assert 1 <= len(widths) <= search.episodes
        search.learn(worth(problem, widths))
        rows += widths.tolist()
        if search.finished:
            assert name_of(search) in ("uniform", "greedy")
            return rows
    assert len(rows) == evaluations  # and not more
    return rows


def made(name: str, problem: PruningProblem, seed: int = 0, **settings: Any) -> Any:
    if name == "ppo-clip":
        settings = {"agent_updates": 5, **settings}
    return make_search(name, steps=len(problem), seed=seed, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_settles_within_the_budget_and_on_the_best(name: str, problem: PruningProblem) -> None:
    search = made(name, problem, evaluations=60)
    rows = played(search, problem)
    best = search.settle(problem)
    model = Blocks()
    whole = counted_flops(model, X)
    lp.prune(model, problem.plan(best[0]))
    assert counted_flops(model, X) <= 0.5 * whole
    census = search.census()
    assert (census.tried, census.distinct) == (len(rows), len(set(map(tuple, rows))))
    assert census.within_budget == sum(problem.cost.fraction(np.array(row)) <= 0.5 for row in rows)
    if name in CONTROLS:
        assert float(worth(problem, best)) == pytest.approx(census.best)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_plans_and_a_saved_state_goes_on(name: str, problem: PruningProblem) -> None:
    first, again = made(name, problem), made(name, problem)
    for _ in range(4):
        rows = first.explore(problem)
        assert (rows == again.explore(problem)).all()
        first.learn(worth(problem, rows))
        again.learn(worth(problem, rows))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    later = made(name, problem, seed=7)
    later.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        rows = again.explore(problem)
        assert (rows == later.explore(problem)).all()
        again.learn(worth(problem, rows))
        later.learn(worth(problem, rows))
    assert (again.settle(problem) == later.settle(problem)).all()
    assert again.census() == later.census()
    if name not in ("uniform", "greedy", "skip-whole"):
        assert not (made(name, problem, seed=1).explore(problem) == made(name, problem).explore(problem)).all()


def test_uniform_gives_every_group_the_same_share(chain: PruningProblem) -> None:
    # Of 80 parameters 40 are allowed: 5 + 5 x 5 + 5 are 35, and 6 + 6 x 6 + 6 are 48.
    assert made("uniform", chain).explore(chain).tolist() == [[5, 5]]


def test_filled_is_the_greatest_in_its_proportions(problem: PruningProblem) -> None:
    generator = np.random.default_rng(0)
    for _ in range(8):
        proportions = generator.uniform(0.05, 1, len(problem)) * problem.sizes
        widths = filled(problem, proportions)
        # The cost of a plain scan over many factors, of which the last that fits is the greatest.
        fits = []
        for factor in np.linspace(0, 30, 301):
            row = [max(w for w in allowed if w <= max(allowed[0], factor * p))
                   for allowed, p in zip(problem.bounds.allowed, proportions, strict=True)]  # fmt: skip
            if problem.cost.fraction(np.array(row)) <= 0.5:
                fits.append(row)
        assert problem.cost.fraction(widths) <= 0.5
        assert problem.cost.fraction(widths) >= problem.cost.fraction(np.array(fits[-1])) - 1e-12
        for group in np.flatnonzero(widths < problem.sizes):
            wider = widths.copy()
            wider[group] += 1
            assert problem.cost.fraction(wider) > 0.5


def test_greedy_takes_the_cheapest_step_of_all_groups(problem: PruningProblem) -> None:
    evaluations = 53
    search = Greedy(episodes=3, evaluations=evaluations)
    rows = played(search, problem, evaluations)

    def cost(row: list[int]) -> float:
        return problem.cost.fraction(np.array(row))

    def reward(row: list[int]) -> float:
        return float(worth(problem, np.array([row], dtype=np.int64))[0].float())

    steps = (evaluations - 1) // len(problem) - 2
    now, expected, step = problem.sizes.tolist(), [problem.sizes.tolist()], 0
    while cost(now) > 0.5 and len(expected) < evaluations:
        step = min(step + 1, steps)
        target = 1 - 0.5 * step / steps
        tried = []
        for group in range(len(problem)):
            row = list(now)
            while cost(row) > target + 1e-12 and row[group] > problem.bounds.least[group]:
                row[group] -= 1
            if row != now:
                tried.append(row)
        expected += tried
        now = min(tried, key=lambda row: (reward(now) - reward(row)) / (cost(now) - cost(row)))
    assert rows[: len(expected)] == expected
    assert cost(now) <= 0.5
    assert search.settle(problem).tolist() == [max(
        (row for row in rows if cost(row) <= 0.5), key=reward
    )]  # fmt: skip


def test_evolution_has_parents_among_the_last_ones_alone(problem: PruningProblem, monkeypatch: Any) -> None:
    search = Evolution(episodes=2, population=6, sample=6)
    parents: list[list[int]] = []
    mutate = search._mutated

    def noted(problem: PruningProblem, widths: list[int]) -> list[int]:
        parents.append(widths)
        return mutate(problem, widths)

    monkeypatch.setattr(search, "_mutated", noted)
    earned: list[float] = []
    for round_ in range(8):
        before = len(parents)
        search.explore(problem)
        for parent in parents[before:]:  # the best of the last six, as all of them are drawn
            last = range(len(earned) - 6, len(earned))
            best = max(last, key=lambda number: earned[number])
            assert parent == search.tried.widths[best]
        rewards = torch.tensor([10.0 - round_, 9.5 - round_])  # the first ones are best, and die out
        search.learn(rewards)
        earned += rewards.tolist()
    assert len(parents) == 2 * (8 - 3)


def test_halving_doubles_the_trials_of_the_better_half(problem: PruningProblem) -> None:
    search = Halving(episodes=100, evaluations=12)
    assert search.first_arms == 4  # 4 + 4 + 4
    first = search.explore(problem)
    search.learn(torch.tensor([0.1, 0.4, 0.3, 0.2]))
    second = search.explore(problem)
    assert [arm[0] for arm in search.arms] == [first[1].tolist(), first[2].tolist()]
    assert len(second) == 4
    search.learn(torch.tensor([0.0, 0.0, 0.2, 0.9]))
    third = search.explore(problem)
    assert [arm[0] for arm in search.arms] == [second[3].tolist()]
    assert len(first) == len(third) == 4
    assert problem.within_budget(np.concatenate([first, second, third])).all()


def test_streams_blocks_and_each_group_are_left_alone_first(problem: PruningProblem) -> None:
    rows = SkipWhole(episodes=100).explore(problem)
    names, sizes = list(problem.graph.groups), problem.sizes
    stream = names.index("stem")
    assert rows[0].tolist() == made("uniform", problem).explore(problem)[0].tolist()
    assert (rows[1] == sizes).tolist() == [name == "stem" for name in names]
    assert (rows[2] == sizes).tolist() == [name != "stem" for name in names]
    assert rows[3][stream] == sizes[stream]
    assert problem.within_budget(rows).all()


@pytest.mark.parametrize("name", ["greedy", "evolution", "halving"])
def test_what_goes_by_rewards_finds_more_than_random_search(name: str) -> None:
    layers = [nn.Linear(3, 40), *(nn.Linear(40, 40) for _ in range(5)), nn.Linear(40, 2)]
    problem = PruningProblem(lp.trace(nn.Sequential(*layers), torch.zeros(1, 3)), keep=0.5)
    best = {}
    for arm in (name, "random"):
        searches = [made(arm, problem, seed=seed, evaluations=60) for seed in range(2)]
        for search in searches:
            played(search, problem)
        best[arm] = np.mean([search.census().best for search in searches])
    assert best[name] > best["random"]


class Stubborn(Agent):
    """Does the same whatever it sees, or goes by the first number that it sees."""

    looks = False

    def observe(self, transition: Any) -> None:
        pass

    def update(self) -> dict[str, float]:
        return {}

    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        wished = observation[..., :1] if self.looks else torch.full_like(observation[..., :1], 0.4)
        return wished.clamp(low, high)

    def _stateful(self) -> dict[str, Any]:
        return {}


class Looking(Stubborn):
    looks = True


def test_an_agent_that_looks_at_nothing_is_said_to_be_constant(problem: PruningProblem, monkeypatch: Any) -> None:
    monkeypatch.setitem(AGENTS, "stubborn", Stubborn)
    monkeypatch.setitem(AGENTS, "looking", Looking)
    censuses = {}
    for name in ("stubborn", "looking", "random", "evolution"):
        search = made(name, problem)
        search.learn(worth(problem, search.explore(problem)))
        censuses[name] = search.census()
    constant = {name: census.constant for name, census in censuses.items()}
    assert constant == {"stubborn": True, "looking": False, "random": None, "evolution": None}
    assert "the agent is constant" in str(censuses["stubborn"])
    assert str(censuses["looking"]) == "10 plans tried, 1 distinct, 10 within the budget"


class Middle(Stubborn):
    """Stays at the allocation, and notes what it has earned."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.earned: list[Tensor] = []

    def observe(self, transition: Any) -> None:
        self.earned.append(torch.as_tensor(transition.reward))

    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        return torch.full_like(observation[..., :1], 0.5).clamp(low, high)


def test_actions_around_an_allocation_are_deviations_from_it(problem: PruningProblem, monkeypatch: Any) -> None:
    monkeypatch.setitem(AGENTS, "middle", Middle)
    uniform = made("uniform", problem).explore(problem)[0]
    search = made("middle", problem, around="best", episodes=2)
    first = search.explore(problem)
    assert (first == uniform).all()
    better = np.array([8, 7, 3, 16])  # within the budget, and so wide that no group could be wider
    search.tried.add(np.stack([uniform, better]), torch.tensor([0.1, 0.2]), np.array([True, True]))
    assert (search.explore(problem) == better).all()
    assert (search.settle(problem) == better).all()
    ranked = lp.plan(problem.graph, problem.scores, keep=0.5, round_to=1)
    by_scores = made("middle", problem, around="allocation", episodes=2).explore(problem)
    assert by_scores[0].tolist() == [
        max(ranked.widths[name], least) for name, least in zip(problem.graph.groups, problem.bounds.least, strict=True)
    ]
    wild = made("random", problem, around="best", span=0.1, episodes=50)
    wild.tried.add(better[None], torch.tensor([0.2]), np.array([True]))
    widths = wild.explore(problem)
    assert problem.within_budget(widths).all()
    # A group goes further than its span only where the budget, or what is open of it, leaves it nothing else.
    assert (np.abs(widths[:, 0] - 8) <= 1).all()
    assert len(np.unique(widths, axis=0)) > 1


def test_actions_and_fractions_are_two_ways_to_say_the_same() -> None:
    residual = Residual(np.array([0.25, 0.5]), span=0.2)
    assert residual.fractions(1, torch.tensor([[0.0], [0.5], [1.0]])).flatten().tolist() == pytest.approx(
        [0.3, 0.5, 0.7]
    )
    fractions = torch.tensor([[0.1], [0.4]])
    actions = residual.actions(0, fractions)
    torch.testing.assert_close(residual.fractions(0, actions), fractions)
    assert residual.actions(0, torch.tensor([[0.0], [1.0]])).flatten().tolist() == [0.0, 1.0]


def test_rewards_are_compared_with_the_best_one_before(problem: PruningProblem, monkeypatch: Any) -> None:
    monkeypatch.setitem(AGENTS, "middle", Middle)
    rounds = [torch.tensor([0.1, 0.5]), torch.tensor([0.4, 0.7])]
    earned = {}
    for against in ("first", "best"):
        search = made("middle", problem, against=against, episodes=2)
        for rewards in rounds:
            search.explore(problem)
            search.learn(rewards)
        earned[against] = search.agent.earned
    deviation = rounds[0].std()
    steps = len(problem)
    for against, level in (("first", 0.3), ("best", 0.5)):
        torch.testing.assert_close(earned[against][0], (rounds[0] - 0.3) / deviation)
        torch.testing.assert_close(earned[against][steps], (rounds[1] - level) / deviation)


def test_unknown_names_and_settings_are_refused(problem: PruningProblem) -> None:
    with pytest.raises(ValueError, match=r"no agent 'dqn'; those known are .*, random, uniform, greedy"):
        made("dqn", problem)
    with pytest.raises(ValueError, match="'greedy' has no setting 'population'"):
        made("greedy", problem, population=3)
    with pytest.raises(ValueError, match="around must be one of nothing, uniform, allocation, best"):
        made("sac", problem, around="worst")
    with pytest.raises(ValueError, match="against must be one of first, best"):
        made("sac", problem, against="worst")
    with pytest.raises(ValueError, match="span must be a fraction"):
        made("sac", problem, around="best", span=0.0)


def test_states_of_before_there_was_a_census_are_read() -> None:
    search = PolicySearch("ppo-clip", steps=2)
    state = search.state_dict()
    del state["tried"], state["constant"]
    search.load_state_dict(state)
    assert search.census().tried == 0
