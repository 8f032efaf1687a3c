"""The Taylor criterion by definition: derivatives by masks on what layers read, example by example."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Effects = list[list[Tensor]]  # per batch, per reader: (examples, channels, positions)


def mask_derivatives(
    model: nn.Module, batch: Any, summed_loss: Callable[[nn.Module, Any], Tensor], readers: tuple[str, ...], width: int
) -> list[Tensor]:
    """Differentiate the loss of a batch by a mask of ones on every number that some layers read of a group."""
    masks: list[Tensor] = []

    def mask(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        masks.append(torch.ones_like(args[0], requires_grad=True))
        return (args[0] * masks[-1],)

    handles = [model.get_submodule(name).register_forward_pre_hook(mask) for name in readers]
    derivatives = torch.autograd.grad(summed_loss(model, batch), masks)
    for handle in handles:
        handle.remove()
    return [derivative.reshape(len(derivative), width, -1) for derivative in derivatives]


def by_definition(effects: Effects, variant: str) -> Tensor:
    """Work out one variant in plain loops over batches, examples and channels."""
    width = effects[0][0].shape[1]
    scores = []
    for channel in range(width):
        examples, batches = [], []
        for batch in effects:
            size = len(batch[0])
            each = []
            for i in range(size):
                numbers = [float(number) for reader in batch for number in reader[i, channel]]
                each.append(sum(abs(n) for n in numbers) if variant == "b" else sum(numbers))
            examples += [abs(value) for value in each] if variant == "a" else each
            batches.append((sum(each) / size) ** 2)
        mean = sum(examples) / len(examples)
        scores.append({"a": mean, "b": mean, "c": abs(mean), "gate": sum(batches) / len(batches)}[variant])
    return torch.tensor(scores, dtype=torch.float64)


def reference(
    model: nn.Module,
    batches: Iterable[Any],
    summed_loss: Callable[[nn.Module, Any], Tensor],
    readers: dict[str, tuple[str, ...]],
    variant: str,
) -> dict[str, Tensor]:
    """Return the unnormalised scores of groups that are each made by the convolution of their name."""
    batches = list(batches)
    return {
        group: by_definition(
            [
                mask_derivatives(model, batch, summed_loss, names, model.get_submodule(group).out_channels)
                for batch in batches
            ],
            variant,
        )
        for group, names in readers.items()
    }
