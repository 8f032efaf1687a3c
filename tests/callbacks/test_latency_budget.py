"""Callbacks with a budget of measured time, on a machine whose time is set by the operations alone."""

import numpy as np
import pytest
from battery import train
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.callbacks import AFIEEarlyPruneCallback, PruningCallback
from lightning_prune.planning import by_time, metrics, profiling
from lightning_prune.planning.cost import Products
from lightning_prune.planning.segments import Segment
from lightning_prune.pruning_plan import plan_in_force


@pytest.fixture(autouse=True)
def machine_of_known_speed(tmp_path, monkeypatch):
    """The real clock has no say: on a busy machine so small a network is as slow at any widths."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def segments(graph, widths, runs=1):
        channels = np.array([widths.get(name, group.size) for name, group in graph.groups.items()])
        operations = Products([term.axes for term in graph.terms["flops"]], list(graph.groups)).of(channels)
        taken = {}
        for term, count in zip(graph.terms["flops"], operations, strict=True):
            segment = Segment(term.module, 0)
            taken[segment] = taken.get(segment, 0.1) + 1e-5 * term.coefficient * count
        return taken

    def fraction(graph, widths):
        return sum(segments(graph, widths).values()) / sum(segments(graph, {}).values())

    monkeypatch.setattr(profiling, "time_segments", segments)
    monkeypatch.setattr(by_time, "measured_fraction", fraction)
    monkeypatch.setattr(metrics, "measured_fraction", fraction)


@pytest.mark.parametrize(
    "callback",
    [
        PruningCallback(keep=0.8, metric="latency", steps=2, round_to="auto"),
        AFIEEarlyPruneCallback(keep=0.8, metric="latency", round_to="auto"),
    ],
    ids=["all channels compete", "by layer"],
)
def test_a_run_meets_its_budget_and_logs_what_it_takes(tmp_path, callback):
    module, trainer = train(tmp_path, callback, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    budget = plan_in_force(module).budget
    assert budget["metric"] == "latency"
    assert 0.7 <= budget["achieved"] <= 0.8
    with open(f"{trainer.log_dir}/metrics.csv") as table:
        assert "prune/latency_ms" in table.readline()


def test_auto_is_for_time_alone():
    with pytest.raises(ValueError, match="round_to must be a whole number of at least 1; got 'auto'"):
        PruningCallback(metric="flops", round_to="auto")
