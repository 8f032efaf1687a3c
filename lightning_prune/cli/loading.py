"""Checkpoints as the subcommands take them: with the class found, and example inputs."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_prune.checkpoint import load_pruned
from lightning_prune.files import read_checkpoint
from lightning_prune.importing import imported, may_be_imported
from lightning_prune.namesakes import namesakes
from lightning_prune.reporting.history import History

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["Loaded", "add_loading_options", "load", "load_given"]


@dataclass
class Loaded:
    """A checkpoint.

    Attributes:
        model: The model with its weights, pruned or not, in evaluation mode.
        inputs: What its forward takes.
        histories: What pruning callbacks have noted until then.
    """

    model: "LightningModule"
    inputs: Any
    histories: list[History]


def add_loading_options(parser: ArgumentParser) -> None:
    """Add the options that say what a checkpoint does not."""
    parser.add_argument("--model", metavar="CLASS_PATH", help="import path of the LightningModule, if it is not found")
    parser.add_argument(
        "--import",
        dest="modules",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules that the checkpoint may name: those of networks and layers of your own",
    )
    parser.add_argument(
        "--input_shape",
        type=int,
        nargs="+",
        metavar="N",
        help="shape of the input with its batch, such as 1 3 224 224 (default: the model's example_input_array)",
    )


def load_given(path: Path, given: Namespace) -> Loaded:
    """Load a checkpoint as the options of `add_loading_options` say; see `load`."""
    try:
        for module in given.modules:
            import_module(module)
    except ImportError as raised:
        raise ValueError(
            f"A module of --import cannot be imported: {raised}; see that it is on the PYTHONPATH."
        ) from raised
    return load(path, given.model, given.input_shape)


def load(path: Path, class_path: str | None = None, input_shape: list[int] | None = None) -> Loaded:
    """Load a checkpoint onto its class, in evaluation mode.

    Args:
        path: The checkpoint file.
        class_path: Import path of the LightningModule; default what the checkpoint says, which `LightningCLI` and the
            pruning callbacks note there, if its module is one of this package or was imported before.
        input_shape: Shape of the input with its batch; default the model's ``example_input_array``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, its class is not found, or there are no inputs.
    """
    checkpoint = read_checkpoint(path)
    histories = _histories(checkpoint)
    found = _find_class(class_path or _noted_class(checkpoint, histories, path))
    model = load_pruned(found, path)
    inputs = torch.zeros(input_shape) if input_shape else model.example_input_array
    if inputs is None:
        raise ValueError(
            f"{type(model).__name__} has no example_input_array; say what its forward takes with --input_shape, such "
            "as --input_shape 1 3 224 224."
        )
    return Loaded(model, inputs, histories)


def _histories(checkpoint: Mapping[str, Any]) -> list[History]:
    noted = checkpoint.get("callbacks")
    states = [state for state in noted.values() if isinstance(state, dict)] if isinstance(noted, dict) else []
    contents = [state.get("history") for state in states]
    return [History.from_json(content) for content in contents if content]


def _noted_class(checkpoint: Mapping[str, Any], histories: list[History], path: Path) -> str:
    settings = checkpoint.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    if "_class_path" not in settings and not histories and {"network", "num_classes", "input_shape"} <= settings.keys():
        return "lightning_prune.models.ImageClassifier"
    noted = settings.get("_class_path", histories[0].model if histories else None)  # of LightningCLI, or of callbacks
    if not isinstance(noted, str):
        raise ValueError(
            f"{str(path)!r} does not say of which class it is: give --model, such as --model mypackage.MyModel."
        )
    if not may_be_imported(noted):
        raise ValueError(
            f"{str(path)!r} says that its class is {noted!r}, which is not imported on the word of a file; if you "
            f"trust it, say so with --model {noted}."
        )
    return noted


def _find_class(class_path: str) -> "type[LightningModule]":
    from lightning.pytorch import LightningModule  # takes seconds, which --help need not

    try:
        found = imported(class_path)
    except ImportError as raised:
        raise ValueError(
            f"{class_path!r} cannot be imported ({raised}); give the import path of the class with --model, and see "
            "that it is on the PYTHONPATH."
        ) from raised
    # The name may come from somebody's checkpoint: nothing but a class of modules is called.
    if not (isinstance(found, type) and issubclass(found, namesakes(LightningModule))):
        raise ValueError(f"{class_path!r} is no LightningModule.")
    return found
