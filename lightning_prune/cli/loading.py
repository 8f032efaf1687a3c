"""Checkpoints as the subcommands take them: with the class found, and example inputs."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.checkpoint import load_pruned
from lightning_prune.export.inputs import refuse_misfit
from lightning_prune.files import read_checkpoint
from lightning_prune.importing import imported, may_be_imported
from lightning_prune.namesakes import namesakes
from lightning_prune.reporting.history import History, histories_in

__all__ = ["Loaded", "add_loading_options", "import_given", "load", "load_given", "load_model", "noted_class"]


@dataclass
class Loaded:
    """A checkpoint.

    Attributes:
        model: The model with its weights, pruned or not, in evaluation mode.
        inputs: What its forward takes.
        histories: What pruning callbacks have noted until then.
    """

    model: Any
    inputs: Any
    histories: list[History]


def add_loading_options(parser: ArgumentParser) -> None:
    """Add the options that say what a checkpoint does not."""
    parser.add_argument(
        "--model", metavar="CLASS_PATH", help="import path of the LightningModule, or other module, if it is not found"
    )
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
    import_given(given)
    return load(path, given.model, given.input_shape)


def import_given(given: Namespace) -> None:
    """Import the modules of ``--import``; raise a ValueError if one cannot be."""
    try:
        for module in given.modules:
            import_module(module)
    except ImportError as raised:
        raise ValueError(
            f"A module of --import cannot be imported: {raised}; see that it is on the PYTHONPATH."
        ) from raised


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
    histories = histories_in(read_checkpoint(path))
    model = load_model(path, class_path)
    inputs = torch.zeros(input_shape) if input_shape else getattr(model, "example_input_array", None)
    if inputs is None:
        raise ValueError(
            f"{type(model).__name__} has no example_input_array; say what its forward takes with --input_shape, such "
            "as --input_shape 1 3 224 224."
        )
    refuse_misfit(model, inputs)
    return Loaded(model, inputs, histories)


def load_model(path: Path, class_path: str | None = None) -> Any:
    """Load a checkpoint onto its class, in evaluation mode.

    Args:
        path: The checkpoint file.
        class_path: Import path of the LightningModule, or of any other module that needs no arguments; default what the
            checkpoint says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, or its class is not found.
    """
    checkpoint = read_checkpoint(path)
    noted = class_path or noted_class(checkpoint)
    if noted is None:
        raise ValueError(
            f"{str(path)!r} does not say of which class it is: give --model, such as --model mypackage.MyModel."
        )
    if class_path is None and not may_be_imported(noted):
        raise ValueError(
            f"{str(path)!r} says that its class is {noted!r}, which is not imported on the word of a file; if you "
            f"trust it, say so with --model {noted}."
        )
    return load_pruned(_find_class(noted, is_given=class_path is not None), path)


def noted_class(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the import path of the class that a checkpoint is of, if `LightningCLI` or a callback has noted it.

    Args:
        checkpoint: What is in it.
    """
    settings = checkpoint.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    if "_class_path" in settings:
        noted = settings["_class_path"]
        return noted if isinstance(noted, str) else None
    histories = histories_in(checkpoint)
    if histories:
        return histories[0].model
    is_classifier = {"network", "num_classes", "input_shape"} <= settings.keys()
    return "lightning_prune.models.ImageClassifier" if is_classifier else None


def _find_class(class_path: str, is_given: bool) -> type[nn.Module]:
    from lightning.pytorch import LightningModule  # takes seconds, which --help need not

    try:
        found = imported(class_path)
    except ImportError as raised:
        raise ValueError(
            f"{class_path!r} cannot be imported ({raised}); give the import path of the class with --model, and see "
            "that it is on the PYTHONPATH."
        ) from raised
    # The name may come from somebody's checkpoint: nothing but a class of modules is called.
    known = nn.Module if is_given else namesakes(LightningModule)
    if not (isinstance(found, type) and issubclass(found, known)):
        raise ValueError(f"{class_path!r} is no LightningModule{', nor another nn.Module' if is_given else ''}.")
    return found
