"""What an earlier version has written is read, and gives the losses that it gave then; see `golden/make.py`."""

import json
from pathlib import Path

import pytest
import torch
from golden import make

import lightning_prune as lp
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

FOLDER = Path(__file__).parent / "golden"
TOLD = json.loads((FOLDER / "losses.json").read_text())


def approximately(numbers: object) -> object:
    return pytest.approx(numbers, rel=1e-4)  # float32, on other machines and with other versions of torch


def test_the_files_are_small_and_hold_what_they_should() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 100_000
    checkpoint = torch.load(FOLDER / "stopped.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert (checkpoint["global_step"], state["steps_done"], state["listened"]) == (make.STOPPED, 1, True)
    assert [prune["step"] for prune in state["history"]["prunes"]] == [1]
    assert state["totals"][0]["sums"].keys() == state["last_scores"].keys() == {"stem", "body"}
    assert (
        checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].shape == checkpoint["state_dict"]["stem.weight"].shape
    )


@pytest.mark.parametrize("way", ["load_pruned", "onto an instance", "load_from_checkpoint"])
def test_the_pruned_checkpoint_loads_with_the_same_loss(way: str) -> None:
    path = FOLDER / "pruned.ckpt"
    if way == "load_from_checkpoint":
        module = make.Golden.load_from_checkpoint(path, weights_only=True)
    else:
        module = lp.load_pruned(make.Golden if way == "load_pruned" else make.Golden(), path)
    assert plan_in_force(module).digest == TOLD["digest"]
    assert (module.stem.out_channels, module.body.out_channels) == (TOLD["widths"]["stem"], TOLD["widths"]["body"])
    assert make.loss_of(module) == approximately(TOLD["loss_of_pruned"])


def test_the_run_that_was_stopped_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    module, _, losses = make.train(tmp_path, ckpt_path=FOLDER / "stopped.ckpt")
    assert losses == approximately(TOLD["losses_after_the_stop"])
    assert plan_in_force(module).digest == TOLD["digest"]
    assert make.loss_of(module) == approximately(TOLD["loss_of_pruned"])


def test_the_plan_prunes_as_it_did() -> None:
    content = json.loads((FOLDER / "plan.json").read_text())
    plan = PruningPlan.from_json(content)
    assert plan.digest == TOLD["digest"]
    assert plan.to_json() == content  # another form of it would be another format version
    module = make.pruned_by(plan)
    assert {"stem": module.stem.out_channels, "body": module.body.out_channels} == TOLD["widths"]
    assert make.loss_of(module) == approximately(TOLD["loss_by_plan"])
