"""Runs that are killed and resumed, on as many ranks or on others: some cells of the table of all of them."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import battery
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # scripts import what is beside them
faults, stored = map(import_module, ("faults", "stored"))
RESULTS = stored.load(faults.RESULTS / "faults.json")
RIGHT = {"bits": None, "ranks": True, "plan": True, "apart": 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")


def differing_worlds(number: int) -> str:
    """Return another of the pairs of worlds for each number."""
    return faults.WORLDS[number % len(faults.WORLDS)]


@pytest.mark.parametrize(
    ("callback", "moment", "world"), [("taylor_gate", "writing", "2 to 1"), ("learn_to_prune", "measuring", "1 to 1")]
)
def test_a_run_that_was_killed_and_resumed_equals_the_unbroken_one(callback: str, moment: str, world: str) -> None:
    record = faults.survive(callback, moment, world)
    assert faults.is_right(record), record


@pytest.mark.long
@pytest.mark.parametrize("moment", faults.MOMENTS)
@pytest.mark.parametrize("callback", battery.CALLBACKS)
def test_every_callback_survives_every_moment_on_some_ranks(callback: str, moment: str) -> None:
    number = list(battery.CALLBACKS).index(callback) + faults.MOMENTS.index(moment)
    record = faults.survive(callback, moment, differing_worlds(number))
    assert faults.is_right(record), record


def test_a_strike_that_does_not_come_is_not_taken_for_one(tmp_path: Path) -> None:
    never = faults.Strike("", epoch=battery.EPOCHS, call=1, first_rank=True)
    with pytest.raises(AssertionError, match="ended with 0, and was not killed"):
        faults.Run("magnitude", 1, True, tmp_path).killed(never)


@pytest.mark.parametrize(
    ("changed", "right"),
    [
        ({}, True),
        ({"bits": True, "apart": 0.0}, True),
        ({"bits": False, "apart": 0.0}, False),
        ({"apart": 1e-8}, False),
        ({"apart": float("nan")}, False),
        ({"ranks": False}, False),
        ({"plan": False}, False),
        ({"failed": "AssertionError: ended with 1"}, False),
    ],
)
def test_what_is_right(changed: dict[str, Any], right: bool) -> None:
    assert faults.is_right(RIGHT | changed) == right


def test_the_table_is_whole_and_right() -> None:
    expected = {
        f"{callback} | {moment} | {world}"
        for callback in battery.CALLBACKS
        for moment in faults.MOMENTS
        for world in faults.WORLDS
    }
    assert set(RESULTS) == expected
    assert [key for key, record in RESULTS.items() if not faults.is_right(record)] == []


def test_the_table_is_what_the_records_give() -> None:
    assert (faults.RESULTS / "faults.md").read_text() == faults.rendered(RESULTS)
