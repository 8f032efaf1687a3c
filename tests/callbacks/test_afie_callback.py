"""Early pruning by entropy: the plan is that of the functions, from the weights after the first epoch."""

import copy
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch

import lightning_prune as lp
from lightning_prune.callbacks import AFIEEarlyPruneCallback
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.pruning_plan import plan_in_force

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Copy(L.Callback):
    """Keep a copy of the network as it is before an epoch; to stand before the callback that prunes."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.copies = [*getattr(self, "copies", []), copy.deepcopy(pl_module)]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("within", ["l1", "l2", "random", {"name": "magnitude", "p": 3}])
def test_the_plan_is_that_of_the_functions(within: Any, flatten: bool, tmp_path: Path) -> None:
    before, settings = Copy(), {"keep": 0.6, "metric": "channels", "round_to": 1}
    module, _ = battery.train(
        tmp_path, before, AFIEEarlyPruneCallback(within, flatten, **settings), max_epochs=3, limit_val_batches=0
    )
    graph = lp.trace(before.copies[1], EXAMPLE)
    expected = plan_by_layer(graph, lp.criteria.afie(graph, flatten), lp.criteria.score(graph, within), **settings)
    assert plan_in_force(before.copies[1]) is None
    assert plan_in_force(module) == expected
    assert plan_in_force(before.copies[2]) == expected


def test_entropy_is_measured_once(tmp_path: Path) -> None:
    """What later prunes take is what the first weights have told."""
    before, callback = Copy(), AFIEEarlyPruneCallback(keep=0.5, steps=3, round_to=1)
    module, _ = battery.train(tmp_path, before, callback, limit_val_batches=0)
    graph = lp.trace(before.copies[1], EXAMPLE)
    entropy = lp.criteria.afie(graph)
    assert callback.state.entropy == pytest.approx(entropy)
    widths = plan_by_layer(graph, entropy, lp.criteria.l1(graph), 0.5, round_to=1).widths
    assert plan_in_force(module).widths == widths
    assert lp.criteria.afie(lp.trace(before.copies[3], EXAMPLE)) != pytest.approx(entropy)


def test_another_module_is_measured_anew(tmp_path: Path) -> None:
    callback = AFIEEarlyPruneCallback(keep=0.5, round_to=1)
    measured = []
    for width in (12, 16):
        module = battery.ResidualClassifier(width)
        battery.train(tmp_path / str(width), callback, module=module, max_epochs=2, limit_val_batches=0)
        measured.append(callback.state.entropy)
    assert measured[0] != measured[1]


def test_a_budget_beyond_the_cap_is_refused_before_training(tmp_path: Path) -> None:
    module = battery.ResidualClassifier(width=200)  # of which 2 must stay, and 4 of the wider layer
    callback = AFIEEarlyPruneCallback(keep=0.008, metric="channels", round_to=1)
    with pytest.raises(
        ValueError, match=r"cannot be reached: .* and at most 0.99 of a layer may be pruned\. Raise keep"
    ):
        battery.train(tmp_path, callback, module=module)
