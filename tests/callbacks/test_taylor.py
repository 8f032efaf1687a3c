"""The Taylor criterion, collected in training steps, against a slow computation of its own."""

import copy
from pathlib import Path

import battery
import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.callbacks import TaylorRankCallback
from lightning_prune.criteria.taylor import channel_effects


class Keep(TaylorRankCallback):
    """Remember the sums that led to the first prune."""

    def scores(self, trainer: L.Trainer, graph: object) -> dict[str, Tensor]:
        self.seen = {name: values.clone() for name, values in self.sums.items()}
        self.ranked = super().scores(trainer, graph)
        return self.ranked


def naive(model: nn.Module, batch: list[Tensor], loss_of: object) -> dict[str, Tensor]:
    """Differentiate the loss with respect to a mask on what each layer reads, one example at a time."""
    readers = {"stem": ("first", "head"), "first": ("second",)}
    found = {group: [] for group in readers}
    for group, names in readers.items():
        width = getattr(model, group).out_channels
        masks = torch.ones(len(batch[0]), width, dtype=torch.float64, requires_grad=True)
        handles = []
        for name in names:

            def mask(
                module: nn.Module, args: tuple[Tensor], masks: Tensor = masks, width: int = width
            ) -> tuple[Tensor]:
                (x,) = args
                wide = masks if x.dim() == 4 else masks.repeat_interleave(x.shape[1] // width, dim=1)
                return (x * wide.view(*wide.shape, *[1] * (x.dim() - 2)),)

            handles.append(getattr(model, name).register_forward_pre_hook(mask))
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), masks)
        found[group] = gradient.abs().mean(0)
        for handle in handles:
            handle.remove()
    return found


class Frozen(battery.ResidualClassifier):
    """Without normalisation the network is the same function in every step; a rate of zero keeps it so."""

    def __init__(self) -> None:
        super().__init__(norm=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_sums_equal_the_gradient_of_a_mask_on_what_is_read(accumulate: int, tmp_path: Path) -> None:
    callback, module = Keep(keep=0.5, round_to=1), Frozen()
    twin = copy.deepcopy(module).double()
    battery.train(
        tmp_path, callback, module=module, max_epochs=2, precision="64-true", accumulate_grad_batches=accumulate
    )
    expected: dict[str, Tensor] = {}
    for images, labels in battery.loaders()[0]:
        for name, values in naive(twin, [images.double(), labels], F.cross_entropy).items():
            expected[name] = expected.get(name, 0) + values / accumulate
    for name, values in callback.seen.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-9)
    assert callback.ranked["first"].norm() == pytest.approx(1.0)


def test_ranks_the_channel_that_nothing_depends_on_last(tmp_path: Path) -> None:
    module = Frozen()
    with torch.no_grad():
        module.second.weight[:, 5] = 0.0
    callback = Keep(keep=0.9, round_to=1)
    battery.train(tmp_path, callback, module=module, max_epochs=2)
    assert int(callback.ranked["first"].argmin()) == 5
    assert float(callback.ranked["first"][5]) == 0.0


def test_channel_effects_by_hand() -> None:
    activation = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    gradient = torch.tensor([[[[1.0, -1.0]], [[0.5, 0.0]]]])
    assert channel_effects(activation, gradient, 1).tolist() == [[-1.0, 1.5]]
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert channel_effects(tokens, torch.ones(1, 2, 2), 2).tolist() == [[4.0, 6.0]]


def test_a_part_that_training_does_not_run_is_reported(tmp_path: Path) -> None:
    class Unused(battery.ResidualClassifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return sum(p.sum() for p in self.parameters()) * 0.0

    with pytest.raises(RuntimeError, match="has seen no gradients of what is to be pruned before epoch 1"):
        battery.train(tmp_path, TaylorRankCallback(), module=Unused())
