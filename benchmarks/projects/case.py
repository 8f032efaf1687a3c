"""What a project is to `trial.py`: its module, its data and its Trainer, as its documentation has them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


@dataclass
class Case:
    """A project that trains.

    Attributes:
        module: Makes the module anew.
        data: Makes what ``fit`` is given beside the module, by name.
        monitor: What the project's ModelCheckpoint chooses the best by; None for what was saved last.
        mode: Whether that is to be small or large, "min" or "max".
        trainer: What its Trainer is made with.
        lightning: The Lightning that the project imports.
        given: What `load_pruned` has to be given, by name, because it is no plain value.
        resumed: What ``fit`` is given besides when it goes on from a checkpoint, as it would be without a prune.
        help: The lines that had to be added or changed beside the callback.
    """

    module: Callable[[], Any]
    data: Callable[[], dict[str, Any]]
    monitor: str | None = None
    mode: str = "min"
    trainer: dict[str, Any] = field(default_factory=dict)
    lightning: Any = pl
    given: Callable[[], dict[str, Any]] = dict
    resumed: dict[str, Any] = field(default_factory=dict)
    help: tuple[str, ...] = ()

    def callbacks(self, work: Path) -> list[Any]:
        """Return the callbacks that the project has anyway."""
        saver = self.lightning.callbacks.ModelCheckpoint
        return [saver(work / "checkpoints", monitor=self.monitor, mode=self.mode, save_last=True)]

    def evaluate(self, work: Path, path: str) -> str:
        """Evaluate a checkpoint as the project does, and say how that went; "" where it has no way of its own."""
        return ""

    def fit(self, work: Path, callbacks: list[Any], ckpt_path: str | None = None, **settings: Any) -> tuple[Any, Any]:
        """Train, and return the module and its Trainer.

        Args:
            work: The folder to write to.
            callbacks: All callbacks.
            ckpt_path: The checkpoint to go on from.
            settings: What the Trainer is given besides.
        """
        self.lightning.seed_everything(0, verbose=False)
        module = self.module()
        plain = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        made = {**plain, **self.trainer, **settings, "callbacks": callbacks, "default_root_dir": work}
        trainer = self.lightning.Trainer(**made)
        going_on = self.resumed if ckpt_path else {}
        trainer.fit(module, ckpt_path=ckpt_path, **self.data(), **going_on)
        return module, trainer
