"""Runs that go on from a checkpoint with other settings: what holds is said when they start, and is true."""

import re
import warnings
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.multiprocessing import ProcessRaisedException

import lightning_prune as lp
from lightning_prune.callbacks import (
    AFIEEarlyPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    TaylorRankCallback,
)
from lightning_prune.planning import CostModel
from lightning_prune.pruning_plan import plan_in_force

LONG = pytest.mark.long  # more of the same kinds


class Stop(Callback):
    """Ends a run in the middle of an epoch, with a checkpoint of that moment."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def checkpoint(root: Path, name: str, step: int, **settings: Any) -> Path:
    """Train one row of the battery up to a step, and return the checkpoint of that moment."""
    path = root / "stopped.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        battery.train(root, battery.make_callback(name, **settings), Stop(path, step))
    return path


def resume(path: Path, callback: PruningCallback, **trainer: Any) -> tuple[Any, list[str]]:
    """Go on from a checkpoint, and return the module and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, _ = battery.train(path.parent / "resumed", callback, ckpt_path=path, **trainer)
    told = [str(one.message) for one in caught]
    return module, [text for text in told if "goes on from a run" in text or "holds no state" in text]


def kept(module: Any, metric: str = "flops") -> float:
    graph = lp.trace(module, torch.zeros(1, 1, 8, 8))
    cost = CostModel(graph, metric)
    plan = plan_in_force(module)
    return cost(plan.widths if plan is not None else {}) / cost.original


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keep": 0.3}, "with keep=0.5, now with keep=0.3"),
        pytest.param(
            {"keep": 0.9, "metric": "params"},
            "with keep=0.5, metric='flops', now with keep=0.9, metric='params'",
            marks=LONG,
        ),
        pytest.param({"start_epoch": 2}, "with start_epoch=1, now with start_epoch=2", marks=LONG),
        pytest.param({"steps": 2}, "with steps=3, now with steps=2", marks=LONG),
        pytest.param(
            {"criterion": {"name": "random", "seed": 1}},
            "with criterion='l1', now with criterion={'name': 'random'",
            marks=LONG,
        ),
        (
            {"round_to": 1, "min_channels": 2, "ignore": ["stem"]},
            r"with round_to=2, min_channels=1, ignore=\[\], now with round_to=1, min_channels=2",
        ),
    ],
)
def test_after_the_last_prune_what_the_checkpoint_holds_is_in_force(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, "magnitude", step=20)
    same, silent = resume(path, battery.make_callback("magnitude"))
    callback = battery.make_callback("magnitude", **changes)
    other, messages = resume(path, callback)
    assert silent == []
    (message,) = messages
    assert re.match(f"PruningCallback goes on from a run {told}.*: that schedule is complete and the network", message)
    assert "what the checkpoint holds is in force and the new settings change nothing; to prune further" in message
    assert battery.differences(same, other) == []
    assert callback.history.settings["keep"] == 0.5


@pytest.mark.parametrize(
    ("changes", "metric", "most"),
    [
        ({"keep": 0.3}, "flops", 0.3),
        pytest.param({"keep": 0.7}, "flops", 0.7, marks=LONG),
        ({"keep": 0.4, "metric": "params"}, "params", 0.4),
        ({"steps": 2, "keep": 0.4}, "flops", 0.4),
        pytest.param({"start_epoch": 2, "every_n_epochs": 1}, "flops", 0.5, marks=LONG),
        pytest.param({"criterion": "l2", "round_to": 1}, "flops", 0.5, marks=LONG),
    ],
)
def test_before_the_last_prune_the_new_settings_hold(
    changes: dict[str, Any], metric: str, most: float, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, "magnitude", step=8)  # one prune of three is done
    callback = battery.make_callback("magnitude", **changes)
    module, (message,) = resume(path, callback)
    assert "the new settings hold for the prunes that are still to come (2 to" in message
    assert "of the " + metric in message
    assert "forgotten" not in message
    assert most - 0.25 < kept(module, metric) <= most
    assert callback.steps_done == callback.steps
    assert {name: callback.history.settings[name] for name in changes} == changes


FORGOTTEN: dict[str, tuple[dict[str, Any], str]] = {
    "taylor": ({"variant": "gate"}, "totals, listened"),
    "taylor_gate": ({"normalize": True}, "last_scores"),
    "afie": ({"flatten": True}, "entropy"),
    "sensitiveness": ({"damage": "magnitude"}, "sensitiveness"),
}


@pytest.mark.parametrize(
    "name", ["taylor", *(pytest.param(name, marks=LONG) for name in FORGOTTEN if name != "taylor")]
)
def test_what_was_learned_under_other_settings_is_forgotten(name: str, tmp_path: Path) -> None:
    changes, forgotten = FORGOTTEN[name]
    path = checkpoint(tmp_path, name, step=9)  # in the epoch after the first prune
    callback = battery.make_callback(name, **changes)
    module, (message,) = resume(path, callback)
    assert f"what was learned under the former ones ({forgotten}) is forgotten" in message
    assert callback.steps_done == 3
    assert kept(module) <= 0.5
    _, (message,) = resume(path, battery.make_callback(name, min_channels=2))  # which nothing learned depends on
    assert "forgotten" not in message


@pytest.mark.parametrize(
    ("changes", "forgotten"),
    [
        ({"keep": 0.3}, "search, searched_epoch, best, in_force, figures"),
        ({"start_epoch": 4}, "search"),
        pytest.param({"agent": "ppo-clip"}, "search", marks=LONG),
        pytest.param(
            {"search_settings": {"agent_updates": 1, "environment_updates": 1, "environment_size": 3}},
            "search",
            marks=LONG,
        ),
        ({"strength": 1e-3}, ""),
    ],
)
def test_an_agent_begins_anew_under_settings_that_it_has_not_learned_under(
    changes: dict[str, Any], forgotten: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, "rl_joint", step=9, start_epoch=3)
    callback = battery.make_callback("rl_joint", **{"start_epoch": 3, **changes})
    module, (message,) = resume(path, callback)
    assert (f"({forgotten}) is forgotten" in message) == bool(forgotten)
    assert "forgotten" in message or not forgotten
    assert kept(module) <= changes.get("keep", 0.5)
    assert callback.steps_done == 1


def test_another_callback_in_the_place_of_one_begins_anew(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "magnitude", step=8)
    callback = TaylorRankCallback(keep=0.4, start_epoch=3, round_to=2)
    module, (message,) = resume(path, callback)
    assert message.startswith(
        "The checkpoint was written with PruningCallback and holds no state of this TaylorRankCallback: its settings "
        "hold, its schedule begins anew"
    )
    assert callback.steps_done == 1
    assert kept(module) <= 0.4


# -- ranks -------------------------------------------------------------------------------------------------------------


def meddled(kind: type[PruningCallback], change: str, value: Any, **settings: Any) -> PruningCallback:
    """Return a callback that has another setting, or company, on the second rank."""

    class Meddled(kind):  # type: ignore[valid-type, misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.global_rank == 1 and change == "callbacks":
                trainer.callbacks.append(value)
            elif trainer.global_rank == 1:
                setattr(self, change, value)
            super().setup(trainer, pl_module, stage)

    return Meddled(keep=0.5, round_to=2, **settings)


def measured(module: Any, batch: Any) -> tuple[float, float]:
    return 0.0, 0.5


Meddling = tuple[type[PruningCallback], str, Any, str]
DISAGREEING: dict[str, Meddling] = {
    "fraction": (PruningCallback, "keep", 0.6, "keep of Meddled is 0.5 on rank 0 and 0.6 on rank 1; give all"),
    "steps": (PruningCallback, "steps", 2, "steps of Meddled is 1 on rank 0 and 2 on rank 1"),  # without end
    "too many steps": (PruningCallback, "steps", 9, "steps of Meddled is 1 on rank 0 and 9 on rank 1"),
    "mapping": (AFIEEarlyPruneCallback, "criterion", {"name": "magnitude", "p": 2}, "criterion of Meddled is 'l1' on"),
    "list": (TaylorRankCallback, "ignore", ["stem"], "ignore of Meddled is [] on rank 0 and ['stem'] on rank 1"),
    "tensor": (PruningCallback, "example_inputs", torch.zeros(1, 1, 8, 8), "None on rank 0 and 'Tensor of shape (1,"),
    "company": (
        PruningCallback, "callbacks", PruningCallback(module="first"),
        "Rank 0 prunes by Meddled and rank 1 by Meddled, PruningCallback; give all ranks the same callbacks",
    ),
    "strength": (RLJointPruneCallback, "strength", 0.09, "strength of Meddled is None on rank 0 and 0.09 on rank 1"),
    "function": (
        RLJointPruneCallback, "evaluate", measured,
        "evaluate of Meddled is None on rank 0 and 'test_resuming.measured' on rank 1",
    ),
}  # fmt: skip


ORDINARY = ("steps", "too many steps", "company", "function")


@pytest.mark.parametrize(
    "case", [*ORDINARY, *(pytest.param(case, marks=LONG) for case in DISAGREEING if case not in ORDINARY)]
)
def test_ranks_with_other_settings_are_refused_before_training(case: str, tmp_path: Path) -> None:
    kind, change, value, message = DISAGREEING[case]
    others = {"start_epoch": 3} if kind is RLJointPruneCallback else {}
    with pytest.raises(ProcessRaisedException, match=re.escape(message)):
        battery.train(tmp_path, meddled(kind, change, value, **others), strategy="ddp_fork", devices=2)
