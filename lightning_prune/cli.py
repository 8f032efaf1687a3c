"""The command line: ``lightning-prune fit --config configs/quickstart.yaml``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

import lightning_prune.callbacks
import lightning_prune.datamodules
import lightning_prune.models  # noqa: F401  so that YAML may name these classes without their path

__all__ = ["main"]

_PACKAGE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-prune``: fit, validate, test or predict, from configs and options of `LightningCLI`.

    A config that is not found is looked for among those that ship with the package.

    Args:
        arguments: The command line without the program's name; default that of the process.
    """
    if arguments is None:
        sys.argv[1:] = [_shipped(argument) for argument in sys.argv[1:]]
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=None if arguments is None else [_shipped(argument) for argument in arguments],
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-prune"},
    )


def _shipped(argument: str) -> str:
    """Return the shipped file for an argument that names a config which is not there."""
    option, equals, path = argument.rpartition("=")
    if not path.endswith((".yaml", ".yml")) or Path(path).exists():
        return argument
    inside = _PACKAGE / "configs" / path.removeprefix("configs/")
    return f"{option}{equals}{inside}" if inside.is_file() else argument


if __name__ == "__main__":
    main()
