"""The environment model: gradients reach all of it, and agents use what it says without changing it."""

import pytest
import torch

from lightning_prune.rl import EnvironmentModel, Transition
from lightning_prune.search import make_agent


def model_of(epochs: int = 6, **settings: object) -> EnvironmentModel:
    return EnvironmentModel(2, 1, seed=0, epochs=epochs, representation_size=8, hidden_sizes=(16,), **settings)


def observe(model: EnvironmentModel, epoch: int, reward: float) -> None:
    model.observe(Transition(torch.rand(2), torch.rand(1), reward, torch.rand(2), terminated=True, epoch=epoch))


def test_embeddings_recurrence_and_decoder_all_receive_gradient() -> None:
    model = model_of()
    for epoch in range(3):
        observe(model, epoch, reward=float(epoch))
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    model.update()
    for name, parameter in model.network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        assert not torch.equal(parameter, before[name]), name
    past, future = model.network.embeddings.weight.grad[:3], model.network.embeddings.weight.grad[3:]
    assert (past.abs().sum(1) > 0).all()
    assert (future == 0).all()  # epochs that have not been say nothing


def test_representation_of_an_epoch_is_the_last_state_over_all_until_then() -> None:
    model = model_of()
    for epoch in (0, 2, 5):
        _, state = model.network.recurrence(model.network.embeddings.weight[: epoch + 1])
        torch.testing.assert_close(model.representation(torch.tensor(epoch)), state[0])
    assert not model.representation(torch.tensor([1])).requires_grad


def test_rewards_that_depend_on_the_epoch_are_predicted() -> None:
    model = model_of(learning_rate=1e-2)
    for _ in range(30):
        for epoch in range(6):
            observe(model, epoch, reward=float(epoch % 2))
    losses = [model.update()["environment_loss"] for _ in range(100)]
    assert losses[-1] < 0.02 < 0.2 < losses[0]  # without the epoch 0.25 is the least there is


def test_representation_is_fresh_after_an_update() -> None:
    model = model_of()
    observe(model, 0, 1.0)
    before = model.representation(torch.tensor(0)).clone()
    model.update()
    assert not torch.equal(model.representation(torch.tensor(0)), before)


def test_an_agent_sees_the_representation_of_the_epoch_and_does_not_train_it() -> None:
    model = model_of()
    for name in ("sac", "ppo-clip"):
        agent = make_agent(
            name,
            2,
            1,
            0,
            context=model.representation,
            context_size=8,
            **({"learning_starts": 0} if name == "sac" else {}),
        )
        observation = torch.rand(2)
        inputs = agent._inputs(observation[None], torch.tensor([3.0]))
        torch.testing.assert_close(inputs[0], torch.cat([observation, model.representation(torch.tensor(3))]))
        for _ in range(256):
            agent.observe(Transition(observation, [0.5], 1.0, observation, terminated=True, epoch=3))
        assert agent.update()
    assert all(parameter.grad is None for parameter in model.network.parameters())


@pytest.mark.long
def test_an_agent_learns_what_to_do_in_each_epoch() -> None:
    """The best action changes from epoch to epoch, and only the representation says so."""
    model = model_of(epochs=2)
    agent = make_agent(
        "sac", 1, 1, 0, context=model.representation, context_size=8, ent_coef=0.01, actor_learning_rate=3e-3
    )
    for step in range(400):
        epoch = step % 2
        action = agent.act([0.0], epoch=epoch)
        reward = -((action.item() - (0.2, 0.8)[epoch]) ** 2)
        agent.observe(Transition([0.0], action, reward, [0.0], terminated=True, epoch=epoch))
        agent.update()
    assert abs(agent.act([0.0], greedy=True, epoch=0).item() - 0.2) < 0.1
    assert abs(agent.act([0.0], greedy=True, epoch=1).item() - 0.8) < 0.1


def test_an_epoch_that_was_not_counted_on_is_refused() -> None:
    with pytest.raises(ValueError, match="not among the 6"):
        observe(model_of(), 6, 0.0)
    with pytest.raises(ValueError, match="not among the 6"):
        model_of().representation(torch.tensor([0, 6]))
