"""Agents by name."""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_prune.importing import imported
from lightning_prune.rl.base import Agent
from lightning_prune.rl.ppo import PPO
from lightning_prune.rl.reinforce import Reinforce
from lightning_prune.rl.sac import SAC
from lightning_prune.rl.settings import chosen
from lightning_prune.rl.trust_regions import TRUST_REGIONS
from lightning_prune.search.random_search import RandomSearch

__all__ = ["AGENTS", "make_agent"]

AGENTS: dict[str, type[Agent]] = {
    "sac": SAC,
    **{f"ppo-{name}": PPO for name in TRUST_REGIONS},
    "reinforce": Reinforce,
    "random": RandomSearch,
}


def make_agent(name: str, observation_size: int, action_size: int, seed: int, **settings: Any) -> Agent:
    """Make an agent by its name.

    Args:
        name: ``sac``, ``ppo-clip``, ``ppo-kl``, ``ppo-cim``, ``ppo-cim-1``, ``ppo-cim-2``, ``reinforce`` or ``random``,
            another name that you have put into `AGENTS`, or the import path of your own subclass of `Agent`.
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers of the agent.
        **settings: As for the agent's class. For PPO, ``trust_region`` takes a mapping of the settings of the trust
            region that the name already says.

    Raises:
        ValueError: If there is no such agent, or it has no such setting.

    Example:
        >>> agent = make_agent("ppo-cim", observation_size=9, action_size=1, seed=0, trust_region={"sigma": 0.5})
        >>> agent.trust_region.sigma
        0.5
        >>> make_agent("dqn", 9, 1, 0)
        Traceback (most recent call last):
        ValueError: There is no agent 'dqn'; those known are sac, ppo-clip, ppo-kl, ppo-cim, ...
    """
    make = _class_of(name)
    known = _settings(make)
    for key in settings:
        if key not in known:
            raise ValueError(f"The agent {name!r} has no setting {key!r}; it has {', '.join(known)}.")
    if make is PPO:
        given = settings.get("trust_region", {})
        if not isinstance(given, Mapping) or "name" in given:
            raise ValueError(
                f"{name!r} names its trust region; `trust_region` takes a mapping of settings; got {given!r}."
            )
        settings["trust_region"] = {"name": name.removeprefix("ppo-"), **given}
    return make(observation_size, action_size, seed, **settings)


def _class_of(name: str) -> type[Agent]:
    if "." not in name:
        return chosen(AGENTS, name, "agent")[0]
    try:
        found = imported(name)
    except ImportError as error:
        raise ValueError(f"Agent {name!r} cannot be imported ({error}): check the path and the PYTHONPATH.") from error
    if not (inspect.isclass(found) and issubclass(found, Agent)):
        raise ValueError(f"{name!r} is no agent: give a subclass of lightning_prune.rl.Agent.")
    return found


def _settings(make: type[Agent]) -> list[str]:
    """Return the settings of an agent's class, and those of all agents."""
    parameters = [*inspect.signature(make).parameters.values(), *inspect.signature(Agent).parameters.values()]
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
