"""Distillation as a setting of the callbacks: the network before the first prune teaches what is left of it."""

import copy
import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.callbacks.distilling import distill_settings, logits_of
from lightning_prune.pruning_plan import plan_in_force

pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")  # prunes nothing, in steps of two channels
ONE_PRUNE: dict[str, Any] = {"keep": 0.5, "start_epoch": 1, "round_to": 2, "distill": True}
THREE_PRUNES = {**ONE_PRUNE, "steps": 3, "distill": {"temperature": 2.0, "share": 0.7}}


class Plain(battery.ResidualClassifier):
    """Learns by an optimizer that has a step of one line."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def soft_loss(said: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """The divergence of the paper, class by class."""
    p, q = (expected / temperature).softmax(1), (said / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


class Plans(L.Callback):
    """Notes what is pruned before each epoch."""

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        plan = plan_in_force(pl_module)
        if plan is not None:
            self.at.setdefault(trainer.current_epoch, plan)


def naive(
    plans: dict[int, Any], epochs: int, temperature: float, share: float, accumulate: int = 1, views: int = 1
) -> nn.Module:
    """Train, prune and distill in a plain loop, in float64."""
    L.seed_everything(0, verbose=False)
    model, teacher = Plain().double().train(), None
    for epoch in range(epochs):
        if epoch in plans:
            if teacher is None:
                teacher = copy.deepcopy(model).eval()
            lp.prune(model, plans[epoch])
        rate = 0.05
        for number, (images, labels) in enumerate(battery.loaders()[0]):
            images = images.double()
            said = [model(images * (view + 1)) for view in range(views)]
            loss = torch.stack([F.cross_entropy(one, labels) for one in said]).mean()
            if teacher is not None:
                with torch.no_grad():
                    expected = [teacher(images * (view + 1)) for view in range(views)]
                soft = [soft_loss(*pair, temperature) for pair in zip(said, expected, strict=True)]
                loss = (1 - share) * loss + share * sum(soft) / views
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= rate * parameter.grad
                        parameter.grad = None
    return model


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((left.double() - right.double()).abs().max()) for left, right in pairs)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_one_step_is_that_worked_out_by_hand() -> None:
    """Two classes, T = 2: teacher (0, 2 ln 3) says 1/4 and 3/4; student (0, 0) says 1/2 each."""
    said = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([[0.0, 2 * torch.log(torch.tensor(3.0, dtype=torch.float64))]], dtype=torch.float64)
    callback = PruningCallback(distill={"temperature": 2, "share": 0.5})
    loss = callback.distillation_loss(said, expected)
    log = torch.log(torch.tensor([0.5, 1.5], dtype=torch.float64))
    by_hand = 4 * (0.25 * log[0] + 0.75 * log[1])
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(said.grad, torch.tensor([[0.5, -0.5]], dtype=torch.float64))  # T (q - p)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}], ids=["each batch", "accumulated"])
def test_training_is_that_of_a_plain_loop(settings: dict[str, Any], tmp_path: Path) -> None:
    callback, plans = PruningCallback(**THREE_PRUNES), Plans()
    module, _ = battery.train(
        tmp_path, callback, plans, module=seeded(Plain).double(), precision="64-true", max_epochs=4, **settings
    )
    assert len(set(plan.digest for plan in plans.at.values())) >= 2
    expected = naive(plans.at, 4, 2.0, 0.7, accumulate=settings.get("accumulate_grad_batches", 1))
    assert apart(module, expected) <= 1e-9
    assert apart(module, naive(plans.at, 4, 2.0, 0.6, accumulate=settings.get("accumulate_grad_batches", 1))) > 1e-6


def seeded(kind: Any) -> L.LightningModule:
    L.seed_everything(0, verbose=False)
    return kind()
