"""Callbacks with a budget of measured time."""

import pytest
from battery import train
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.callbacks import AFIEEarlyPruneCallback, PruningCallback
from lightning_prune.graph.channel_graph import plan_in_force


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


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
    assert budget["achieved"] <= 0.8
    with open(f"{trainer.log_dir}/metrics.csv") as table:
        assert "prune/latency_ms" in table.readline()


def test_auto_is_for_time_alone():
    with pytest.raises(ValueError, match="round_to must be a whole number of at least 1; got 'auto'"):
        PruningCallback(metric="flops", round_to="auto")
