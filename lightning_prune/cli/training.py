"""Training from the command line: LightningCLI with the classes of this package, and its shipped configs."""

import sys
from collections.abc import Sequence

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

__all__ = ["PruneCLI", "main", "parsed"]

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
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)


def main(arguments: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        arguments: The command line; configs in it that are not found are looked for among those that ship.
    """
    parsed(PruneCLI, arguments, run=True)


def parsed(cli: type[PruneCLI], arguments: Sequence[str], run: bool) -> PruneCLI:
    """Return what a command line describes.

    Args:
        cli: The class that parses it.
        arguments: The command line; configs in it that are not found are looked for among those that ship.
        run: Whether to run the subcommand in it; otherwise there is none.
    """
    found = [find(argument) for argument in arguments]
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
