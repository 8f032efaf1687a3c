import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from lightning_prune.models import Optimization


class NoDecay(torch.optim.SGD):
    """An optimizer of the user."""


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm(4), nn.Linear(2, 3))


def test_only_weights_of_convolutions_and_linear_layers_decay():
    model = network()
    decayed, spared = Optimization(weight_decay=0.3).make_optimizer(model).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert len(spared["params"]) == 6
    assert len(Optimization().make_optimizer(nn.Linear(2, 2, bias=False)).param_groups) == 1


def test_frozen_parameters_are_in_the_optimizer_so_that_they_can_be_trained_later():
    model = network().requires_grad_(False)
    groups = Optimization().make_optimizer(model).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_optimizer_gets_every_setting():
    group = Optimization(lr=0.3, optimizer_args={"momentum": 0.8, "nesterov": True}).make_optimizer(network())
    assert [group.param_groups[0][name] for name in ("lr", "momentum", "nesterov")] == [0.3, 0.8, True]


def test_sgd_has_momentum_unless_told_otherwise():
    assert Optimization().make_optimizer(network()).param_groups[0]["momentum"] == 0.9
    settings = Optimization(optimizer_args={"momentum": 0})
    assert settings.make_optimizer(network()).param_groups[0]["momentum"] == 0


def test_optimizers_by_name_and_by_path():
    assert type(Optimization(optimizer="AdamW").make_optimizer(network())) is torch.optim.AdamW
    assert type(Optimization(optimizer=f"{__name__}.NoDecay").make_optimizer(network())) is NoDecay


def test_steps_divide_by_ten_at_each_milestone():
    settings = Optimization(schedule="steps", milestones=[2, 4])
    assert [settings.factor(epoch, 6) for epoch in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("schedule", ["cosine", "steps", "constant"])
def test_warmup_rises_in_equal_steps_before_any_schedule(schedule):
    settings = Optimization(schedule=schedule, warmup_epochs=3, milestones=[7])
    assert [settings.factor(epoch, 8) for epoch in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_ends_at_zero_and_stays_there():
    assert [Optimization().factor(epoch, 4) for epoch in (0, 4, 5)] == pytest.approx([1, 0, 0])
    assert Optimization().factor(1, 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    # Trial runs shorter than or as long as their warm-up: the schedule is asked once more after the last epoch.
    assert Optimization(warmup_epochs=5).factor(5, 3) == 1
    assert Optimization(warmup_epochs=5).factor(5, 5) == 1


def test_cosine_starts_anew_at_each_restart():
    """As torch's own schedule with restarts, where periods are equal."""
    settings = Optimization(lr=0.3, restarts=[3, 6])
    optimizer = settings.make_optimizer(network())
    schedule = settings.make_schedule(optimizer, max_epochs=9)
    reference = CosineAnnealingWarmRestarts(settings.make_optimizer(network()), T_0=3)
    for _ in range(9):
        assert schedule.get_last_lr() == pytest.approx(reference.get_last_lr())
        optimizer.step()
        schedule.step()
        reference.step()
    assert schedule.get_last_lr() == pytest.approx([0, 0])


def test_periods_between_restarts_may_differ_and_follow_the_warmup():
    settings = Optimization(warmup_epochs=1, restarts=[3, 7])
    half = 0.5 + 0.5 * math.cos(math.pi / 4)
    expected = [0.5, 1, 0.5, 1, half, 0.5, 1 - half, 1, 0.5]
    assert [settings.factor(epoch, 9) for epoch in range(9)] == pytest.approx(expected)
    assert settings.factor(8, 5) == 0  # a trial run that is shorter than the restarts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 would not train: set a learning rate above 0"),
        ({"lr": math.nan}, "lr=nan would not train"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is negative: set it to 0"),
        ({"schedule": "cosin"}, "schedule='cosin' is unknown: choose one of cosine, steps, constant"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1 is negative: set it to 0"),
        ({"schedule": "steps"}, "schedule='steps' needs milestones: list the epochs"),
        ({"schedule": "steps", "milestones": [5, 5]}, r"milestones=\[5, 5\] do not rise: list epochs above 0"),
        ({"schedule": "steps", "milestones": [0]}, r"milestones=\[0\] do not rise"),
        ({"restarts": [5, 5]}, r"restarts=\[5, 5\] do not rise"),
        ({"restarts": [2], "warmup_epochs": 2}, "begin within the warm-up: list epochs after warmup_epochs"),
        ({"restarts": [2], "schedule": "constant"}, "'constant' has no restarts: choose 'cosine'"),
        ({"optimizer": "Sgd"}, "optimizer='Sgd' cannot be found .* give the name of a class of torch.optim"),
        ({"optimizer": "no_such_package.SGD"}, "optimizer='no_such_package.SGD' cannot be found"),
        ({"optimizer": "os.system"}, "optimizer='os.system' is no optimizer"),
        ({"optimizer_args": {"momentum": -1.0}}, "'SGD' refuses .*Invalid momentum value: -1.0"),
        ({"optimizer_args": {"beta": 1}}, "'SGD' refuses .*unexpected keyword argument 'beta'"),
        ({"optimizer_args": {"nesterov": True, "momentum": 0}}, "'SGD' refuses .*Nesterov momentum requires"),
    ],
)
def test_bad_setting_is_refused_with_its_name_and_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimization(**settings)
