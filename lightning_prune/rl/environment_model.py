"""A recurrent model of an environment that changes from epoch to epoch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_prune.rl.buffers import ReplayBuffer
from lightning_prune.rl.checkpointed import Checkpointed, Stateful
from lightning_prune.rl.networks import mlp
from lightning_prune.rl.transitions import Layout, Transition

__all__ = ["EnvironmentModel", "EnvironmentNetwork"]


class EnvironmentNetwork(nn.Module):
    """Predict rewards from a representation of the epoch: epoch embeddings, a GRU over them, and a decoder.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        epochs: Number of epochs that there can be.
        representation_size: Numbers in an embedding and in a representation.
        hidden_sizes: Hidden layers of the decoder.
        generator: Source of the first weights.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        epochs: int,
        representation_size: int,
        hidden_sizes: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.embeddings = nn.utils.skip_init(nn.Embedding, epochs, representation_size)
        nn.init.normal_(self.embeddings.weight, generator=generator)
        self.recurrence = nn.GRU(representation_size, representation_size, device="meta").to_empty(device="cpu")
        bound = representation_size**-0.5
        for parameter in self.recurrence.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        inputs = observation_size + action_size + representation_size
        self.decoder = mlp((inputs, *hidden_sizes, 1), generator)

    def representations(self, epochs: int) -> Tensor:
        """Return the (epochs, representation) of the first epochs, each of which knows all before it.

        Args:
            epochs: How many.
        """
        states, _ = self.recurrence(self.embeddings.weight[:epochs])
        return states

    @override
    def forward(self, observation: Tensor, action: Tensor, epoch: Tensor) -> Tensor:
        """Return the (n,) rewards predicted; embeddings, recurrence and decoder all get gradients.

        Args:
            observation: (n, observation).
            action: (n, action).
            epoch: (n,) integers.
        """
        epochs_until_last = int(epoch.max()) + 1
        representation = self.representations(epochs_until_last)[epoch]
        inputs = torch.cat([observation, action, representation], dim=-1)
        return self.decoder(inputs).squeeze(-1)


class EnvironmentModel(Checkpointed):
    """Learn what sets the epochs apart, from the rewards that actions earned in them.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        epochs: Number of epochs that there can be.
        representation_size: Numbers in a representation.
        hidden_sizes: Hidden layers of the decoder.
        learning_rate: Learning rate of Adam.
        batch_size: Transitions in a gradient step.
        buffer_size: Transitions kept to learn from.
        device: Where the network and the transitions are kept.

    Note:
        Ganjdanesh et al., "Jointly Training and Pruning CNNs via Learnable Agent Guidance and Alignment" (CVPR 2024);
        the sizes are those of a reproduction. Where rewards come at the end of an episode, observe transitions that all
        carry the reward of their episode: else the model mostly learns to predict zeros.

    Example:
        >>> model = EnvironmentModel(observation_size=1, action_size=1, seed=0, epochs=10, representation_size=4)
        >>> for epoch in (0, 1):
        ...     model.observe(Transition([0.0], [0.5], float(epoch), [0.0], terminated=True, epoch=epoch))
        >>> losses = [model.update()["environment_loss"] for _ in range(50)]
        >>> losses[-1] < 0.1 * losses[0]
        True
        >>> model.representation(torch.tensor([0, 1])).shape  # what an agent takes as its `context`
        torch.Size([2, 4])
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        seed: int,
        *,
        epochs: int,
        representation_size: int = 128,
        hidden_sizes: Sequence[int] = (300, 300),
        learning_rate: float = 1e-3,
        batch_size: int = 64,
        buffer_size: int = 10_000,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(seed)
        self.network = EnvironmentNetwork(
            observation_size, action_size, epochs, representation_size, hidden_sizes, self.generator
        ).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), learning_rate, fused=True)
        unused_bounds = torch.zeros(action_size, device=device)
        layout = Layout(observation_size, unused_bounds, unused_bounds)
        self.replay_buffer = ReplayBuffer(layout, buffer_size)
        self.epochs = epochs
        self.batch_size = batch_size
        self._representations: Tensor | None = None  # of all epochs, until the network changes

    def observe(self, transition: Transition) -> None:
        """Take note of a step and its epoch.

        Args:
            transition: The step.

        Raises:
            ValueError: If its epoch is not one of those that there can be.
        """
        self._check(torch.as_tensor(transition.epoch))
        self.replay_buffer.add(transition)

    def update(self) -> dict[str, float]:
        """Learn to predict the rewards of a batch.

        Returns:
            The mean squared error as ``environment_loss``; nothing if nothing was observed.
        """
        if not len(self.replay_buffer):
            return {}
        batch = self.replay_buffer.sample(self.batch_size, self.generator)
        predicted = self.network(batch.observation, batch.action, batch.epoch.long())
        loss = F.mse_loss(predicted, batch.reward)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._representations = None
        return {"environment_loss": loss.item()}

    @torch.no_grad()
    def representation(self, epoch: Tensor) -> Tensor:
        """Return the representation of each epoch, without gradient.

        Args:
            epoch: (...) integers.

        Returns:
            (..., representation) numbers.

        Raises:
            ValueError: If an epoch is not one of those that there can be.
        """
        self._check(epoch)
        if self._representations is None:
            self._representations = self.network.representations(self.epochs)
        return self._representations[epoch]

    def _check(self, epoch: Tensor) -> None:
        possible = (epoch >= 0) & (epoch < self.epochs)
        if not bool(possible.all()):
            raise ValueError(
                f"Epoch {epoch.tolist()} is not among the {self.epochs} of the environment model: raise `epochs`."
            )

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._representations = None

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {  # the keys are those of saved checkpoints
            "network": self.network,
            "optimizer": self.optimizer,
            "memory": self.replay_buffer,
        }
