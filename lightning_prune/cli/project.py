"""A trained network and its data, as `prune` and `plan` take them: from a checkpoint, a config, and options."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lightning_prune.checkpoint import load_pruned
from lightning_prune.cli.loading import add_loading_options, import_given, load_model, noted_class
from lightning_prune.cli.shipped_configs import found
from lightning_prune.files import read_checkpoint
from lightning_prune.importing import nothing_imported_for

__all__ = [
    "Project",
    "add_network_options",
    "add_project_options",
    "load_network",
    "load_project",
    "without_settings",
]

Sections = dict[str, Any]
_SECTIONS = ("model", "data")


@dataclass
class Project:
    """A trained network and its data.

    Attributes:
        model: The network with its weights, pruned already or not.
        data: The data module; None where the LightningModule has loaders of its own.
        data_settings: The data module by name, with its settings, as plain values.
    """

    model: nn.Module
    data: Any = None
    data_settings: Sections = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the network is no LightningModule."""
        from lightning.pytorch import LightningModule

        return not isinstance(self.model, LightningModule)


# -- options -----------------------------------------------------------------------------------------------------------


def add_project_options(parser: ArgumentParser) -> None:
    """Add the options that say which class and which data are meant."""
    add_network_options(parser)
    parser.add_argument(
        "--data",
        metavar="CLASS_PATH",
        help="LightningDataModule; its settings follow as --data.NAME VALUE, as those of a model do as --model.NAME",
    )
    parser.add_argument("--accelerator", default="auto", help="as for a Trainer: auto, cpu, gpu ... (default: auto)")
    parser.add_argument("--torch_threads", type=int, metavar="N", help="CPU threads of torch (default: its own choice)")


def add_network_options(parser: ArgumentParser) -> None:
    """Add the options that say which class is meant."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config with the sections model and data (default: for data, config.yaml of the run of the checkpoint)",
    )
    add_loading_options(parser)


def without_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line in two: its own arguments, and the dotted settings of model and data with their values.

    Args:
        arguments: The command line.

    Example:
        >>> without_settings(["a.ckpt", "--data.batch_size", "8", "--keep=0.5", "--model.width=4"])
        (['a.ckpt', '--keep=0.5'], ['--data.batch_size=8', '--model.width=4'])
    """
    own: list[str] = []
    settings: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        is_setting = argument.startswith(tuple(f"--{name}." for name in _SECTIONS))
        if not is_setting:
            own.append(argument)
        elif "=" in argument:
            settings.append(argument)
        else:
            value = next(remaining, "")
            settings.append(f"{argument}={value}")
    return own, settings


# -- loading -----------------------------------------------------------------------------------------------------------


def load_project(path: Path | None, given: Namespace, settings: Sequence[str]) -> Project:
    """Load a trained network and its data.

    The class of the network is what ``--model`` says, or the checkpoint, or the config; the data are those of
    ``--data``, of the config, of the checkpoint's own hyper-parameters, or of the run's ``config.yaml`` beside it.

    Args:
        path: The checkpoint; None for the network of the config, with the weights that it names.
        given: The options of `add_project_options`.
        settings: Dotted settings, from `without_settings`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the class, the weights or the settings do not fit, or the class cannot be told.
    """
    sections = _sections_of(given.config)
    model, checkpoint = _network_and_content(path, given, settings, sections)
    section = given.data or sections.get("data")
    is_trusted = section is not None
    if section is None and path is not None:
        section = _noted_data(checkpoint) or _sections_of(_config_beside(path)).get("data")
    if section is None:
        return Project(model)
    # What was found beside a checkpoint comes from anywhere, as the checkpoint does.
    with nullcontext() if is_trusted else nothing_imported_for(section, "lightning_prune"):
        parsed = _parsed({"data": section}, [setting for setting in settings if setting.startswith("--data.")])
    described = parsed.parser.dump(parsed.config, skip_none=False, format="json")
    return Project(model, parsed.datamodule, json.loads(described).get("data", {}))


def load_network(path: Path | None, given: Namespace, settings: Sequence[str]) -> Any:
    """Load a trained network; the arguments are those of `load_project`, whose errors are raised.

    Without a checkpoint, it is the network of the config.
    """
    model, _ = _network_and_content(path, given, settings, _sections_of(given.config))
    return model


def _network_and_content(
    path: Path | None, given: Namespace, settings: Sequence[str], sections: Sections
) -> tuple[Any, Mapping[str, Any]]:
    """Return the network, and what is in its checkpoint."""
    import_given(given)
    checkpoint = _content(path, is_known=bool(given.model or sections.get("model")))
    for_model = [setting for setting in settings if setting.startswith("--model.")]
    is_noted = not for_model and bool(given.model or noted_class(checkpoint))
    if is_noted and path is not None:
        model = load_model(path, given.model)
        _keep_class_path(model, checkpoint)
        return model, checkpoint
    section = given.model or sections.get("model")
    if section is None:
        where = f"{str(path)!r} does not say" if path is not None else "The command line does not say"
        raise ValueError(
            f"{where} of which class the model is: give --model, such as --model mypackage.MyModel, or a --config."
        )
    made = _parsed({"model": section}, for_model).model
    return made if path is None else _with_weights(made, path), checkpoint


def _content(path: Path | None, is_known: bool) -> Mapping[str, Any]:
    """Return what is in a checkpoint; nothing for published weights, where it is known what they are of."""
    try:
        return read_checkpoint(path) if path is not None else {}
    except ValueError:
        if not is_known:
            raise
        return {}


def _keep_class_path(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Let the next checkpoint say, as this one does, by which class the command line makes the model."""
    saved = checkpoint.get("hyper_parameters")
    noted = dict(saved) if isinstance(saved, Mapping) else {}
    for name in ("_class_path", "_instantiator"):
        if name in noted and hasattr(model, "hparams"):
            model.hparams[name] = noted[name]


def _noted_data(checkpoint: Mapping[str, Any]) -> Sections | None:
    """Return the data module that LightningCLI has noted in a checkpoint, if it has."""
    saved = checkpoint.get("datamodule_hyper_parameters")
    if not isinstance(saved, Mapping) or not isinstance(saved.get("_class_path"), str):
        return None
    arguments = {name: value for name, value in saved.items() if not name.startswith("_")}
    return {"class_path": saved["_class_path"], "init_args": arguments}


def _config_beside(path: Path) -> Path | None:
    """Return the config of the run that has written a checkpoint: in its folder, or the one above."""
    places = [folder / "config.yaml" for folder in path.absolute().parents[:2]]
    return next((place for place in places if place.is_file()), None)


def _sections_of(config: Path | None) -> Sections:
    """Return what a config says of model and data; what it takes from files beside it is read."""
    if config is None:
        return {}
    config = Path(found(str(config)))
    content = _read(config)
    sections = {}
    for name in _SECTIONS:
        section = content.get(name)
        if isinstance(section, str) and section.endswith((".yaml", ".yml")):
            section = _read(config.parent / section)
        sections[name] = section
    return sections


def _read(path: Path) -> Sections:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no config at {str(path)!r}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as raised:
        raise ValueError(f"{str(path)!r} cannot be read as YAML: {raised}") from raised
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is no config: it holds no settings by name.")
    return content


def _parsed(sections: Sections, settings: Sequence[str]) -> Any:
    """Make what sections of a config describe, as `fit` does."""
    from lightning_prune.cli.training import PartsCLI, parsed  # takes seconds, which --help need not

    return parsed(PartsCLI, [f"--config={json.dumps(sections)}", *settings], run=False)


def _with_weights(model: Any, path: Path) -> nn.Module:
    """Give a model that a config describes the weights of a checkpoint, or published ones."""
    from lightning_prune.models import ImageClassifier, load_weights

    try:
        return load_pruned(model, path)
    except ValueError:
        if not isinstance(model, ImageClassifier):
            raise
    load_weights(model.network, path)
    return model.eval()
