"""``lightning-prune plan``: what budgets cost before any training, as a person types it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from test_prune_command import FAST, HERE, Images, accuracy, fails

import lightning_prune as lp
from lightning_prune.cli import methods, surveying
from lightning_prune.cli.entry import main
from lightning_prune.pruning_plan import plan_in_force

DATA = ["--data", f"{HERE}.Images", "--model", "battery.ResidualClassifier"]
KEEPS = ["--keep", "0.7", "0.4"]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the checkpoint of a network that is somewhat trained, where timing takes no time."""
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])
    for module in (surveying, methods):
        monkeypatch.setattr(module, "forward_times", lambda *_, **__: [[2.0, 2.2, 2.4], [1.0, 1.1, 1.0]])
    model = battery.ResidualClassifier()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    images, labels = battery.images(96).tensors
    for _ in range(10):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    path = tmp_path / "run" / "net.ckpt"
    path.parent.mkdir()
    lp.save(model, path)
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["plan", *map(str, arguments), *DATA, *FAST])
    return capsys.readouterr().out


def kept_in(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint.parent / "net.plan.json").read_text())
    return content


def test_what_is_told_is_what_prune_then_gives(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint.read_bytes()
    told = planned(capsys, checkpoint, *KEEPS, "--method", "taylor")
    assert checkpoint.read_bytes() == before
    rows = kept_in(checkpoint)["rows"]
    tried = [(row["method"], row["keep"]) for row in rows]
    assert tried == [(method, keep) for method in ("taylor", "random", "uniform") for keep in (0.7, 0.4)]
    assert "2.00x (2.00-2.40)" in told
    for row in rows[1::3]:
        out = tmp_path / "out.ckpt"
        options = [*DATA, *FAST, "--method", row["method"], "--keep", row["keep"]]
        main(["prune", str(checkpoint), str(out), *map(str, options)])
        model = lp.load_pruned(battery.ResidualClassifier, out)
        assert row["metrics"]["val/accuracy"] == pytest.approx(accuracy(model, Images()))
        plan = plan_in_force(model)
        assert row["widths"] == plan.widths
        assert row["kept"]["flops"] == pytest.approx(plan.budget["achieved"])
        assert f"{row['metrics']['val/accuracy']:.4f}" in told
    page = (checkpoint.parent / "net.plan.html").read_text()
    assert "taylor: val/accuracy" in page
    assert "random 0.4" in page


def test_a_search_for_widths_is_a_method_and_prune_finds_the_same(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "EVALUATIONS", 12)
    told = planned(capsys, checkpoint, "--keep", "0.5", "--method", "evolution")
    assert re.search(r"evolution at 0\.5: 12 plans tried, \d+ distinct, 12 within the budget", told)
    rows = {row["method"]: row for row in kept_in(checkpoint)["rows"]}
    assert list(rows) == ["evolution", "random", "uniform"]
    assert rows["evolution"]["kept"]["flops"] <= 0.5
    out = tmp_path / "out.ckpt"
    main(["prune", str(checkpoint), str(out), *DATA, *FAST, "--method", "evolution", "--keep", "0.5"])
    assert plan_in_force(lp.load_pruned(battery.ResidualClassifier, out)).widths == rows["evolution"]["widths"]


def test_a_survey_that_was_broken_off_goes_on_to_the_same(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(capsys, checkpoint, *KEEPS)
    unbroken = [{**row, "seconds": 0} for row in kept_in(checkpoint)["rows"]]
    (checkpoint.parent / "net.plan.json").unlink()
    measured: list[tuple[str, float]] = []
    measure = surveying.Surveyor._measured

    def counted(self: Any, trainer: Any, method: str, keep: float) -> Any:
        if len(measured) == 3:
            raise ZeroDivisionError
        measured.append((method, keep))
        return measure(self, trainer, method, keep)

    monkeypatch.setattr(surveying.Surveyor, "_measured", counted)
    with pytest.raises(ZeroDivisionError):
        planned(capsys, checkpoint, *KEEPS)
    assert len(kept_in(checkpoint)["rows"]) == 3
    monkeypatch.setattr(surveying.Surveyor, "_measured", measure)
    told = planned(capsys, checkpoint, *KEEPS)
    assert [{**row, "seconds": 0} for row in kept_in(checkpoint)["rows"]] == unbroken

    def never(*_: Any) -> Any:
        raise AssertionError("all was measured before")

    monkeypatch.setattr(surveying.Surveyor, "_measured", never)
    assert planned(capsys, checkpoint, *KEEPS) == told


@pytest.mark.long
def test_other_weights_or_data_are_measured_anew_and_other_settings_beside(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--keep", "0.5"]
    planned(capsys, checkpoint, *some)
    told = planned(capsys, checkpoint, *some, "--metric", "params")
    assert "anew" not in told
    assert [row["settings"]["metric"] for row in kept_in(checkpoint)["rows"]] == ["flops"] * 3 + ["params"] * 3
    told = planned(capsys, checkpoint, *some, "--data.count", "64")
    assert "net.plan.json was about other data: all is measured anew." in told
    assert len(kept_in(checkpoint)["rows"]) == 3
    lp.save(battery.ResidualClassifier(), checkpoint)
    told = planned(capsys, checkpoint, *some, "--data.count", "64")
    assert "net.plan.json was about other weights: all is measured anew." in told


def test_auto_takes_what_was_best(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(capsys, checkpoint, *KEEPS, "--method", "taylor")
    content = kept_in(checkpoint)
    for row in content["rows"]:  # as if it had been so
        row["metrics"]["val/accuracy"] = 0.9 if (row["method"], row["keep"]) == ("uniform", 0.4) else 0.5
    file = checkpoint.parent / "net.plan.json"
    file.write_text(json.dumps(content))
    command = ["prune", str(checkpoint), str(tmp_path / "out.ckpt"), *DATA, *FAST, "--keep", "0.45"]
    main(command)
    told = capsys.readouterr().out
    assert f"pruned by uniform (best in val/accuracy of 3 at keep 0.4 in {file})" in told
    main([*command, "--validate_batches", "1"])  # which makes no other network
    assert "pruned by uniform" in capsys.readouterr().out
    main([*command, "--min_channels", "3"])
    assert "pruned by coherent_obs (the default: " in capsys.readouterr().out
    lp.save(battery.ResidualClassifier(), checkpoint)
    main(command)
    assert "is about other weights or data)" in capsys.readouterr().out


def test_what_cannot_be_is_a_row_with_its_reason(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, checkpoint, "--keep", "0.5", "0.0001", "--method", "oracle")
    assert "not measured: oracle at 0.0001" in told
    assert ": keep=0.0001 of the flops cannot be reached: " in told
    assert len(kept_in(checkpoint)["rows"]) == 6


def test_all_methods_are_compared(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(capsys, checkpoint, "--keep", "0.5", "--method", "all", "--compensate", "none")
    rows = kept_in(checkpoint)["rows"]
    methods = [row["method"] for row in rows]
    assert {"coherent_obs", "taylor", "l1", "random", "uniform", "batch_norm_scale"} <= set(methods)
    assert len(methods) == len(set(methods))
    assert all(row["metrics"] or row["refusal"] for row in rows)


def test_what_is_no_survey_is_left_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint.parent / "net.plan.json"
    for content in ("hello", "{}", "[]", '{"version": 9}', '{"version": 1, "rows": 3}'):
        file.write_text(content)
        told = fails(capsys, "plan", checkpoint, *DATA, *FAST)
        assert "is no survey of `lightning-prune plan`" in told
        assert file.read_text() == content
    assert "There is no criterion 'tailor'" in fails(capsys, "plan", checkpoint, "--method", "tailor")
    assert "keep must be the fraction" in fails(capsys, "plan", checkpoint, "--keep", "0")
    assert "plan needs a trained network" in fails(capsys, "plan")
    assert "There is no folder" in fails(capsys, "plan", checkpoint, "--out", "no/such.json")
