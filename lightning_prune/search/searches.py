"""Searches by name: agents that decide step by step, and controls."""

from typing import Any

from lightning_prune.rl.selection import select
from lightning_prune.search.agents import AGENTS
from lightning_prune.search.controls import CONTROLS
from lightning_prune.search.policy_search import PolicySearch
from lightning_prune.search.width_search import WidthSearch

__all__ = ["make_search"]


def make_search(
    name: str,
    *,
    steps: int,
    episodes: int = 10,
    evaluations: int = 100,
    epochs: int = 1,
    seed: int = 0,
    **settings: Any,
) -> WidthSearch:
    """Make a search for widths by its name.

    Args:
        name: ``uniform``, ``greedy``, ``evolution``, ``halving`` or ``skip-whole``, another name that you have put into
            `CONTROLS`, or that of an agent as for `make_agent`.
        steps: Number of groups that are decided on.
        episodes: Greatest number of plans in a round.
        evaluations: Number of plans that can be tried in all, by which controls divide their work.
        epochs: Number of epochs that there can be.
        seed: Seed of all random numbers.
        **settings: As for `PolicySearch` if it is an agent, or for the class of the control.

    Raises:
        ValueError: If there is no such search, it has no such setting, or a setting is out of range.

    Example:
        >>> make_search("evolution", steps=3, population=8).population
        8
        >>> make_search("evolution", steps=3, agent_updates=5)
        Traceback (most recent call last):
        ValueError: The search 'evolution' has no setting 'agent_updates'; it has episodes, evaluations, seed, ...
    """
    if "." not in name:
        select({**AGENTS, **CONTROLS}, name, "agent")  # refuses others
    if name not in CONTROLS:
        return PolicySearch(name, steps=steps, episodes=episodes, epochs=epochs, seed=seed, **settings)
    given = {"episodes": episodes, "evaluations": evaluations, "seed": seed, **settings}
    control, own = select(CONTROLS, {"name": name, **given}, "search")
    made: WidthSearch = control(**own)
    return made
