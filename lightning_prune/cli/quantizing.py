"""Export in int8: batches of the validation split, on which ranges are seen, and what is told of the file."""

from argparse import Namespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_prune.cli.fitting import validate_once
from lightning_prune.cli.project import Project
from lightning_prune.export.quantizing import Quantized, export_int8
from lightning_prune.reporting.speed import Speed

__all__ = ["export_quantized"]


class Spread(pl.Callback):
    """Keeps batches of the validation split, evenly spread over it: splits are often sorted by class.

    Args:
        most: Greatest number of batches.

    Attributes:
        batches: The batches, on the CPU, as the LightningModule gets them.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.batches: list[Any] = []
        self._every = 1
        self._seen = 0

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        batches = sum(trainer.num_val_batches)
        if batches < float("inf"):
            self._every = max(1, -(-int(batches) // self.most))

    @override
    def on_validation_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *which: Any) -> None:
        batch, *_ = which
        if self._seen % self._every == 0 and len(self.batches) < self.most:
            self.batches.append(tree_map(_on_cpu, batch))
        self._seen += 1

    def calibrating_first(self, calibrate: int) -> list[Any]:
        """Return the batches, those first that ranges are seen on, which are spread over the split too.

        Args:
            calibrate: Number of those.
        """
        count = len(self.batches)
        chosen = sorted({number * count // calibrate for number in range(min(calibrate, count))})
        others = [number for number in range(count) if number not in chosen]
        return [self.batches[number] for number in (*chosen, *others)]


def export_quantized(project: Project, given: Namespace) -> list[str]:
    """Export a network in int8, and return what is told of it, line by line.

    Args:
        project: The network and its data.
        given: The options of the command.
    """
    spread = Spread(given.calibrate_batches + given.check_batches)
    validate_once(project, spread, given)
    batches = spread.calibrating_first(given.calibrate_batches)
    found = export_int8(project.model, batches, given.out, given.calibrate_batches, given.symmetric)
    return _told(found, given)


def _told(found: Quantized, given: Namespace) -> list[str]:
    of_float, of_int8 = found.megabytes
    lines = [f"Written to {given.out} in int8: {of_int8:.2f} MB, in float {of_float:.2f} MB"]
    if found.accuracy is not None:
        before, after = found.accuracy
        lines.append(f"accuracy of {found.samples} validation samples: {after:.4f} in int8, {before:.4f} in float")
    same = "" if found.agreement is None else f"the same class for {found.agreement:.1%}; "
    lines.append(f"outputs of {found.samples} samples: {same}{found.apart:.1%} apart (root mean square)")
    threads = torch.get_num_threads()
    where = f"CPU, {threads} thread{'s' * (threads != 1)}"
    speed = Speed(*found.milliseconds, where)
    times = f"{speed.spread_after} ms in int8, {speed.spread_before} ms in float"
    lines.append(f"onnxruntime, batches of {found.batch_size}: {times}: {speed.verdict}")
    return lines


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf
