"""Training from the command line: LightningCLI with the classes of this package, and its shipped configs."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_prune.callbacks
import lightning_prune.datamodules
import lightning_prune.models  # noqa: F401  so that YAML may name these classes without their path
from lightning_prune.cli.entry import COMMANDS
from lightning_prune.cli.shipped_configs import find
from lightning_prune.files import read_checkpoint

__all__ = ["PartsCLI", "PruneCLI", "main", "parsed"]

CLI = TypeVar("CLI", bound="PruneCLI")
_EPILOG = f"Besides these: {', '.join(COMMANDS)}. Each has a --help of its own. --version tells the version."


class PruneCLI(LightningCLI):
    """LightningCLI with one more option: ``torch_threads``, the number of CPU threads of torch."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
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

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning takes the hyper-parameters of a checkpoint for settings of the model, of whatever class it is; those
        # of a module that was made in Python name none.
        path = self.config[self.subcommand_given].get("ckpt_path") if self.subcommand_given else None
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
    return cli(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=None if from_process else found,
        run=run,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-prune", "epilog": _EPILOG},
    )
