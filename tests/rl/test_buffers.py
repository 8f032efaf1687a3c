"""Layout, replay buffer and rollout buffer: what goes in comes out, in the right place."""

from dataclasses import fields

import pytest
import torch

from lightning_prune.rl.buffers import ReplayBuffer, RolloutBuffer
from lightning_prune.rl.transitions import Layout, Transition


def layout() -> Layout:
    return Layout(observation_size=3, low=torch.tensor([0.0, -1.0]), high=torch.tensor([1.0, 2.0]))


def full(n: int) -> Transition:
    """Return a transition in which every number is another."""
    shapes = {"reward": (n,), "terminated": (n,), "truncated": (n,), "epoch": (n,)}
    shapes |= {"observation": (n, 3), "next_observation": (n, 3)}
    return Transition(**{field.name: torch.rand(shapes.get(field.name, (n, 2))) for field in fields(Transition)})


def test_a_packed_transition_unpacks_to_itself() -> None:
    transition, one = full(4), layout()
    unpacked = one.unpack(one.pack(transition))
    for field in fields(Transition):
        assert torch.equal(getattr(unpacked, field.name), getattr(transition, field.name)), field.name


def test_what_is_not_given_is_filled_in_for_every_row() -> None:
    one = layout()
    step = one.unpack(one.pack(Transition(torch.zeros(2, 3), torch.zeros(2, 2), [1.0, 2.0], torch.zeros(2, 3), False)))
    assert step.low.tolist() == step.next_low.tolist() == [[0.0, -1.0]] * 2
    assert step.high.tolist() == step.next_high.tolist() == [[1.0, 2.0]] * 2
    assert step.epoch.tolist() == step.truncated.tolist() == step.terminated.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("n", [1, 3])
def test_the_buffer_keeps_the_last_ones_and_no_others(n: int) -> None:
    buffer = ReplayBuffer(layout(), buffer_size=5)
    rewards = torch.arange(12.0)
    for some in rewards.split(n):
        rows = len(some)
        buffer.add(Transition(torch.zeros(rows, 3), torch.zeros(rows, 2), some, torch.zeros(rows, 3), False))
    drawn = buffer.sample(500, torch.Generator().manual_seed(0)).reward
    assert (len(buffer), buffer.count) == (5, 12)
    assert drawn.unique().tolist() == [7.0, 8.0, 9.0, 10.0, 11.0]


def test_a_buffer_that_is_not_full_draws_only_what_it_has() -> None:
    buffer = ReplayBuffer(layout(), buffer_size=5)
    buffer.add(Transition(torch.zeros(3), torch.zeros(2), 4.0, torch.zeros(3), False))
    assert buffer.sample(50, torch.Generator().manual_seed(0)).reward.tolist() == [4.0] * 50


def test_a_rollout_keeps_steps_and_environments_apart() -> None:
    rollout = RolloutBuffer(layout())
    steps = [full(2) for _ in range(3)]
    for step in steps:
        rollout.add(step)
    assert len(rollout) == 6
    taken = rollout.take()
    assert torch.equal(taken.action, torch.stack([step.action for step in steps]))
    assert torch.equal(taken.reward, torch.stack([step.reward for step in steps]))
