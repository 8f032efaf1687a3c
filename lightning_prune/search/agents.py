"""Agents by name."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning_prune.importing import imported
from lightning_prune.rl.agent import Agent, AgentSettings
from lightning_prune.rl.ppo import PPO
from lightning_prune.rl.reinforce import Reinforce
from lightning_prune.rl.sac import SAC
from lightning_prune.rl.selection import select
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
    agent_class = _agent_class(name)
    known = _names_of_settings(agent_class)
    for key in settings:
        if key not in known:
            raise ValueError(f"The agent {name!r} has no setting {key!r}; it has {', '.join(known)}.")
    if agent_class is PPO:
        settings["trust_region"] = _trust_region(name, settings.get("trust_region", {}))
    return agent_class(observation_size, action_size, seed, **settings)


def _agent_class(name: str) -> type[Agent]:
    if "." not in name:
        agent_class, _ = select(AGENTS, name, "agent")
        return agent_class
    try:
        found = imported(name)
    except ImportError as error:
        raise ValueError(f"Agent {name!r} cannot be imported ({error}): check the path and the PYTHONPATH.") from error
    if not (inspect.isclass(found) and issubclass(found, Agent)):
        raise ValueError(f"{name!r} is no agent: give a subclass of lightning_prune.rl.Agent.")
    return found


def _names_of_settings(agent_class: type[Agent]) -> list[str]:
    """Return the names of the settings of an agent's class, and then of those of all agents."""
    shared = [field.name for field in fields(AgentSettings)]
    names = [field.name for field in fields(agent_class.settings_type)]
    return [name for name in names if name not in shared] + shared


def _trust_region(agent: str, settings: Any) -> dict[str, Any]:
    """Return the setting of PPO, from the trust region in the name of the agent and that trust region's settings."""
    if not isinstance(settings, Mapping) or "name" in settings:
        raise ValueError(
            f"{agent!r} names its trust region; `trust_region` takes a mapping of settings; got {settings!r}."
        )
    return {"name": agent.removeprefix("ppo-"), **settings}
