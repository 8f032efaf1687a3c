"""Budgets of latency in another runtime, or on another machine: the cost comes from a table of what that took."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.tables import TABLE, table_from, table_of, use_table

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["check_runtime", "planned_metric", "prepare_runtime"]

_HERE = "onnxruntime"


def check_runtime(runtime: str, metric: str) -> None:
    """Raise a ValueError unless a setting names a runtime that budgets of latency can go by.

    Args:
        runtime: The setting.
        metric: What the budget is of.
    """
    if runtime == "torch":
        return
    if runtime != _HERE and not str(runtime).endswith(".json"):
        raise ValueError(
            f"runtime must be 'torch', 'onnxruntime', or the path of a table (.json) that `lightning-prune profile` "
            f"has printed; got {runtime!r}."
        )
    if metric != "latency":
        raise ValueError(f"runtime={runtime!r} is about metric='latency'; got metric={metric!r}.")


def planned_metric(callback: "PruningCallback") -> str:
    """Return the metric that plans are made by."""
    return callback.metric if callback.runtime == "torch" else TABLE


def prepare_runtime(trainer: "pl.Trainer", callback: "PruningCallback", graph: ChannelGraph) -> None:
    """Give a graph the times that a budget goes by, if they are not those of torch; called when training starts.

    Args:
        trainer: The trainer.
        callback: The callback.
        graph: The traced model.

    Raises:
        ValueError: If the table is damaged, or about another network.
    """
    if callback.runtime != "torch":
        content = decided_by_first_rank(trainer, lambda: _content(callback.runtime, graph))
        use_table(graph, table_of(content))


def _content(runtime: str, graph: ChannelGraph) -> Any:
    """Return a table as plain values: one that was measured elsewhere, or one that is measured now."""
    try:
        if runtime != _HERE:
            return table_from(runtime)
        from lightning_prune.export.latency_pack import write_pack
        from lightning_prune.export.latency_table import measure_pack

        with TemporaryDirectory(prefix="lightning-prune-") as folder:
            pack = Path(folder, "pack.zip")
            write_pack(graph, pack)
            return measure_pack(pack, torch.get_num_threads())
    except (OSError, ImportError) as raised:  # which all ranks are to hear of
        raise ValueError(str(raised)) from raised
