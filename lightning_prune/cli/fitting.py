"""A Trainer that trains nothing: it gives a callback the module on its device, its data, and its own validation."""

import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from lightning_prune.cli.methods import AtOnce
from lightning_prune.cli.project import Project
from lightning_prune.cli.shell import Shell

__all__ = ["run_once", "validate_once"]

_BESIDE_THE_POINT = (
    "`LightningModule.configure_optimizers` returned `None`",
    "`isinstance.treespec, LeafSpec.` is dep",
)


def run_once(project: Project, callback: AtOnce, given: Namespace) -> Trainer:
    """Let a callback do its work on a module and its data.

    Args:
        project: The module and its data.
        callback: What does the work.
        given: The options of `add_project_options`.

    Returns:
        The trainer, to save the module with.

    Raises:
        ValueError: If the module has no data, or cannot be pruned.
    """
    model: Any = project.model
    if project.is_plain:
        model = Shell(model)
        callback.module = "network"
    if project.data is None and not is_overridden("train_dataloader", model):
        raise ValueError(
            f"There are no data to look at for {type(project.model).__name__}: give --data, such as --data "
            "mypackage.MyDataModule, or the --config of its training."
        )
    if given.torch_threads is not None:
        torch.set_num_threads(given.torch_threads)
    vars(model)["configure_optimizers"] = lambda: None  # nothing is trained
    try:
        with _quietly(), tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(callback, given.accelerator, folder)
            trainer.fit(model, datamodule=project.data)
            trainer.optimizers = []  # Lightning's stand-in for none has no state that another could take
    finally:
        vars(model).pop("configure_optimizers", None)
    return trainer


def validate_once(project: Project, callback: Callback, given: Namespace) -> None:
    """Let a callback see the validation of a module.

    Args:
        project: The module and its data.
        callback: What looks on.
        given: The options of `add_project_options`.

    Raises:
        ValueError: If the module has no validation data.
    """
    model: Any = Shell(project.model) if project.is_plain else project.model
    owner = model if project.data is None else project.data
    if not is_overridden("val_dataloader", owner):
        raise ValueError(
            f"There are no validation data for {type(project.model).__name__}: give --data, such as --data "
            "mypackage.MyDataModule, or the --config of its training."
        )
    if given.torch_threads is not None:
        torch.set_num_threads(given.torch_threads)
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        _trainer(callback, given.accelerator, folder).validate(model, datamodule=project.data, verbose=False)


def _trainer(callback: Callback, accelerator: str, folder: str) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Let Lightning say nothing of a training that is none."""
    names = ("lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            for text in _BESIDE_THE_POINT:
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
