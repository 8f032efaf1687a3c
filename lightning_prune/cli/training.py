"""Training from the command line: LightningCLI with the classes of this package, and its shipped configs."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_prune.callbacks
import lightning_prune.datamodules
import lightning_prune.models
from lightning_prune.callbacks import PruningCallback
from lightning_prune.callbacks.refusals import refuse_short_run
from lightning_prune.callbacks.schedule import pruning_callbacks
from lightning_prune.cli.option_errors import OptionError, reworded, settings_of_class
from lightning_prune.cli.shipped_configs import find
from lightning_prune.files import read_checkpoint
from lightning_prune.importing import imported

__all__ = ["PartsCLI", "PruneCLI", "main", "parsed"]

CLI = TypeVar("CLI", bound="PruneCLI")
_ROOMS = (lightning_prune.callbacks, lightning_prune.models, lightning_prune.datamodules)
_NAMED = {name: getattr(room, name) for room in _ROOMS for name in getattr(room, "__all__", ())}
_NAMES = [name for name, value in _NAMED.items() if isinstance(value, type)]
_USUAL = {"prune": ["PruningCallback"]}
_KNOWN_PLACES = ("best", "last", "hpc", "registry")  # that Lightning finds by itself
_TOLD = {
    "fit": "Train a model, and prune it while it trains by the callback of the section prune.",
    "validate": "Run the module's own validation, of a checkpoint that was pruned or not.",
    "test": "Run the module's own test, of a checkpoint that was pruned or not.",
    "predict": "Run the module's own predict_step, of a checkpoint that was pruned or not.",
}


class Parser(LightningArgumentParser):
    """The parser of LightningCLI, which says in one sentence what is wrong."""

    typed: ClassVar[Sequence[str]] = ()

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = [option for option in self._options() if option.startswith("--")]
        settings = [f"--{section}.{name}" for section, kind in _classes(self.typed) for name in settings_of_class(kind)]
        raise OptionError(reworded(message, [*options, *settings], self.typed, _NAMES)) from ex

    def _options(self) -> list[str]:
        """Return the options of the subcommand in the command line, or of a command without any."""
        action = self._subcommands_action
        parser: Any = action.choices.get(self.typed[0], self) if action and self.typed else self
        if "trainer" not in {one.dest.partition(".")[0] for one in parser._actions}:  # of a class alone
            return []
        return [option for one in parser._actions for option in one.option_strings]


def _classes(typed: Sequence[str]) -> Iterator[tuple[str, type]]:
    """Yield the classes that a command line names by itself or in its configs, each with its section."""
    for section in ("prune", "model", "data"):
        named = [value for option, value in _values(typed) if option in (f"--{section}", f"--{section}.class_path")]
        named = named or [str(path) for path in _paths_in_configs(typed, section)] or _USUAL.get(section, [])
        for path in named[-1:]:
            with suppress(ImportError):
                yield section, _NAMED.get(path) or imported(path)


def _values(typed: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument, following in zip(typed, [*typed[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        yield option, value if equals else following


def _paths_in_configs(typed: Sequence[str], section: str) -> Iterator[Any]:
    for option, value in _values(typed):
        if option in ("--config", "-c"):
            with suppress(OSError, yaml.YAMLError, ValueError):
                content = yaml.safe_load(Path(value).read_text())
                found = content.get(section) if isinstance(content, dict) else None
                if isinstance(found, dict) and "class_path" in found:
                    yield found["class_path"]


class PruneCLI(LightningCLI):
    """LightningCLI with a section for the callback that prunes, and the number of CPU threads of torch."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(PruningCallback, "prune", subclass_mode=True, required=False)
        parser.add_argument(
            "--torch_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch (default: torch's own choice). Small networks are fastest with 1, above all "
            "where other programs keep the cores busy.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without a warning where another program's command line is at hand

    def before_fit(self) -> None:
        """Refuse a schedule that does not fit into the run before any data are touched, or a logger has written."""
        for callback in pruning_callbacks(self.trainer):
            refuse_short_run(self.trainer, callback)

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning takes the hyper-parameters of a checkpoint for settings of the model, of whatever class it is; those
        # of a module that was made in Python name none.
        path = self.config[self.subcommand_given].get("ckpt_path") if self.subcommand_given else None
        if path and "://" not in path and path not in _KNOWN_PLACES and not Path(path).is_file():
            raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}: correct --ckpt_path.")
        if path and Path(path).is_file() and "_class_path" not in _hyper_parameters(path):
            return
        super()._parse_ckpt_path()

    @property
    def subcommand_given(self) -> str | None:
        """The subcommand in the command line, if there are any."""
        return self.config.get("subcommand")

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        given = [callback for callback in callbacks if callback is not None]  # the section may be absent
        return super()._instantiate_trainer(config, given)


class PartsCLI(PruneCLI):
    """Make the model and the data that a config describes, whichever of the two there is, and no Trainer."""

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=bool | int, default=False)  # what is loaded needs no seed

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    @override
    def instantiate_trainer(self, **settings: Any) -> Any:
        return None


def _help_of_subcommands() -> dict[str, dict[str, str]]:
    """Return what each subcommand says of itself, before its hundred options."""
    usage = "lightning-prune {} --config FILE [options]"
    return {name: {"description": told, "usage": usage.format(name)} for name, told in _TOLD.items()}


def _hyper_parameters(path: str) -> Mapping[str, Any]:
    """Return the hyper-parameters in a checkpoint; raise a ValueError if it cannot be read."""
    saved = read_checkpoint(path).get("hyper_parameters")
    return saved if isinstance(saved, Mapping) else {}


def main(arguments: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        arguments: The command line; configs in it that are not found are looked for among those that ship.
    """
    parsed(PruneCLI, arguments, run=True)


def parsed(cli: type[CLI], arguments: Sequence[str], run: bool) -> CLI:
    """Return what a command line describes.

    Args:
        cli: The class that parses it.
        arguments: The command line; configs in it that are not found are looked for among those that ship.
        run: Whether to run the subcommand in it; otherwise there is none.
    """
    found = find(arguments)
    from_process = sys.argv[1:] == list(arguments)
    if from_process:
        sys.argv[1:] = found  # what LightningCLI reads, and what starts the other ranks
    Parser.typed = found
    return cli(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=None if from_process else found,
        run=run,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        parser_kwargs={"prog": "lightning-prune", **_help_of_subcommands()} if run else {"prog": "lightning-prune"},
    )
