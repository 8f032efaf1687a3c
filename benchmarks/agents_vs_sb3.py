"""Our SAC and PPO against Stable-Baselines3, and the trust regions of PPO against each other, on control tasks.

Both sides get the same number of steps and the same settings. The return is the mean over 20 episodes of the policy
without exploration, after training. Steps per second are counted in processor time of one thread, environments
included, so that whatever else the machine does has no say in it::

    python benchmarks/agents_vs_sb3.py [--env Pendulum-v1 Hopper-v5 ...] [--seeds 3] [--agents sac sb3-sac ...]
    python benchmarks/agents_vs_sb3.py --env Hopper-v5 --sac-steps 10000 --ppo-steps 300000    # fewer than is usual

Each row is written to ``benchmarks/results/agents_vs_sb3.json`` when it is done, and not computed again; all tasks and
agents have their first seed before any has its second. Needs ``gymnasium[mujoco]`` and ``stable-baselines3``.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import stored
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from lightning_prune.rl import Agent, Transition
from lightning_prune.search import make_agent

RESULTS = Path(__file__).parent / "results" / "agents_vs_sb3.json"
AGENTS = (
    "sac", "sb3-sac", "ppo-clip", "sb3-ppo", "ppo-kl", "ppo-cim", "ppo-cim-1", "ppo-cim-2", "ppo-cim adaptive",
    "ppo-cim narrow",
)  # fmt: skip
PEERS = {name: "sb3-sac" if name == "sac" else "sb3-ppo" for name in AGENTS if not name.startswith("sb3")}
EPISODES = 20
SAC_WIDTHS, PPO_WIDTHS = [256, 256], [64, 64]
PPO_ENVIRONMENTS, ROLLOUT = 4, 2048
CIM = {  # else alpha is 5, as in the code of the authors, whose first-order form lacks a factor of sqrt(2 pi)
    "ppo-cim-1": {"coefficient": 5 * math.sqrt(2 * math.pi)},
    "ppo-cim adaptive": {"target": 5e-4},  # about what a divergence of 0.01 nats is for a policy with a std of 0.5
    "ppo-cim narrow": {"sigma": 0.3},  # as in a search for widths
}

Policy = Callable[[np.ndarray], np.ndarray]


@dataclass
class Task:
    """A task of gymnasium, and the settings that both sides have there."""

    sac_steps: int
    ppo_steps: int
    learning_rate: float = 3e-4
    gamma: float = 0.99


TASKS = {
    "Pendulum-v1": Task(10_000, 200_000, learning_rate=1e-3, gamma=0.9),
    "Reacher-v5": Task(50_000, 300_000),
    "Swimmer-v5": Task(100_000, 500_000, gamma=0.9999),
    "Hopper-v5": Task(100_000, 500_000),
}


def ours(name: str, env: str, task: Task, steps: int, seed: int) -> tuple[Policy, float]:
    """Train one of our agents; return its policy and the processor time in seconds."""
    count = 1 if name == "sac" else PPO_ENVIRONMENTS
    environments = SyncVectorEnv([lambda: gymnasium.make(env)] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    space = environments.single_action_space
    agent = make_agent(
        name.split()[0],
        environments.single_observation_space.shape[0],
        space.shape[0],
        seed,
        low=space.low.tolist(),
        high=space.high.tolist(),
        gamma=task.gamma,
        **(our_sac(task, steps) if name == "sac" else our_ppo(task, float(space.high[0]), name)),
    )
    start = time.process_time()
    train(agent, environments, steps, seed)
    seconds = time.process_time() - start
    return lambda observation: agent.act(observation, greedy=True).numpy(), seconds


def our_sac(task: Task, steps: int) -> dict[str, Any]:
    return {
        "hidden_sizes": SAC_WIDTHS,
        "ent_coef": "auto",
        "actor_learning_rate": task.learning_rate,
        "critic_learning_rate": task.learning_rate,
        "batch_size": 256,
        "buffer_size": steps,
    }


def our_ppo(task: Task, reach: float, name: str) -> dict[str, Any]:
    return {
        "hidden_sizes": PPO_WIDTHS,
        "policy": {"name": "gaussian", "initial_std": 1.0 / reach},  # theirs starts at 1 in the units of the action
        "learning_rate": task.learning_rate,
        "rollout_size": ROLLOUT,
        "trust_region": CIM.get(name, {}),
    }


def train(agent: Agent, environments: SyncVectorEnv, steps: int, seed: int) -> None:
    """Let an agent act, observe and learn, for so many steps over all environments."""
    observation, _ = environments.reset(seed=seed)
    for _ in range(0, steps, environments.num_envs):
        action = agent.act(observation)
        following, reward, terminated, truncated, infos = environments.step(action.numpy())
        reached = following.copy()
        if "final_obs" in infos:  # what an episode ended with, where `following` is the start of the next
            for row in np.flatnonzero(infos["_final_obs"]):
                reached[row] = infos["final_obs"][row]
        agent.observe(Transition(observation, action, reward, reached, terminated, truncated))
        agent.update()
        observation = following


def theirs(name: str, env: str, task: Task, steps: int, seed: int) -> tuple[Policy, float]:
    """Train an agent of Stable-Baselines3; return its policy and the processor time in seconds."""
    shared = {"learning_rate": task.learning_rate, "gamma": task.gamma, "seed": seed, "device": "cpu"}
    if name == "sb3-sac":
        model = stable_baselines3.SAC(
            "MlpPolicy",
            DummyVecEnv([lambda: gymnasium.make(env)]),
            buffer_size=steps,
            batch_size=256,
            policy_kwargs={"net_arch": SAC_WIDTHS},
            **shared,
        )
    else:
        model = stable_baselines3.PPO(
            "MlpPolicy",
            DummyVecEnv([lambda: gymnasium.make(env)] * PPO_ENVIRONMENTS),
            n_steps=ROLLOUT // PPO_ENVIRONMENTS,
            policy_kwargs={"net_arch": PPO_WIDTHS},
            **shared,
        )
    start = time.process_time()
    model.learn(steps)
    seconds = time.process_time() - start
    return lambda observation: model.predict(observation, deterministic=True)[0], seconds


def evaluate(policy: Policy, env: str) -> float:
    """Return the mean return of a policy over episodes that start the same way for all."""
    environment = gymnasium.make(env)
    returns = []
    for episode in range(EPISODES):
        observation, _ = environment.reset(seed=10_000 + episode)
        total, ended = 0.0, False
        while not ended:
            observation, reward, terminated, truncated, _ = environment.step(policy(observation))
            total += float(reward)
            ended = terminated or truncated
        returns.append(total)
    return statistics.mean(returns)


def run(env: str, agent: str, seed: int, steps: int) -> dict[str, float]:
    """Train and evaluate."""
    learn = theirs if agent.startswith("sb3") else ours
    policy, seconds = learn(agent, env, TASKS[env], steps, seed)
    return {"return": round(evaluate(policy, env), 3), "steps_per_second": round(steps / seconds, 1)}


def table(rows: list[dict[str, Any]], env: str) -> str:
    """Return a markdown table of one task; better is a higher return, and a ratio of speeds above 1."""
    lines = [
        "| agent | steps | return (mean, std, seeds) | minus peer's, % of it | steps/s | ratio |",
        "|" + "---|" * 6,
    ]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: AGENTS.index(row["agent"])):
        if row["env"] == env:
            found.setdefault((row["agent"], row["steps"]), []).append(row)
    for (name, steps), own in found.items():
        returns, speed = [row["return"] for row in own], statistics.median(row["steps_per_second"] for row in own)
        deviation = statistics.stdev(returns) if len(returns) > 1 else math.nan
        against = ["", ""]
        peer = found.get((PEERS.get(name, ""), steps))
        if peer:
            other = statistics.mean(row["return"] for row in peer)
            other_speed = statistics.median(row["steps_per_second"] for row in peer)
            against = [f"{100 * (statistics.mean(returns) - other) / abs(other):+.1f}", f"{speed / other_speed:.2f}"]
        figures = f"{statistics.mean(returns):.1f}, {deviation:.1f}, {len(returns)}"
        lines.append(f"| {name} | {steps} | {figures} | {against[0]} | {speed:.0f} | {against[1]} |")
    return f"{env}\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", choices=TASKS, default=["Pendulum-v1"])
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=AGENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sac-steps", type=int, help="instead of those of the task")
    parser.add_argument("--ppo-steps", type=int, help="instead of those of the task")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = stored.load(arguments.results) or []
    order = itertools.product(range(arguments.seeds), arguments.env, arguments.agents)
    for seed, env, name in order:
        task = TASKS[env]
        wanted = (arguments.sac_steps or task.sac_steps) if "sac" in name else (arguments.ppo_steps or task.ppo_steps)
        steps = math.ceil(wanted / ROLLOUT) * ROLLOUT  # whole rollouts
        # The records of earlier runs call gamma the discount.
        made = stored.made_with(arguments, learning_rate=task.learning_rate, discount=task.gamma)
        made["stable_baselines3"] = stable_baselines3.__version__
        asked = {"env": env, "agent": name, "seed": seed, "steps": steps}
        known = [row for row in rows if all(row[field] == value for field, value in asked.items())]
        if known:
            stored.sign(known[0], made)
            continue
        rows.append({**asked, **run(**asked), "made": made})
        print(rows[-1], flush=True)
        stored.save(arguments.results, rows)
    for env in arguments.env:
        print(table(rows, env))


if __name__ == "__main__":
    main()
