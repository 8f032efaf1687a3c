"""The configs that ship with the package: found by name, listed, and copied out for an installed user.

A config may take its model and its data from files beside it (``data: datasets/imagenet.yaml``), which LightningCLI
reads as they stand. A copy holds all of it in one file.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.files import check_folder

__all__ = ["FOLDER", "copy", "find", "found", "listing", "main"]

FOLDER = Path(__file__).parents[1] / "configs"
_OPTIONS = ("--config", "-c")
_OTHER_FILE = re.compile(r"^(\w+): (\S+\.yaml)$", re.MULTILINE)


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune configs``: list the configs that ship with the package, or copy one out.

    Args:
        arguments: The command line after ``configs``.
    """
    parser = CommandParser("lightning-prune configs", description="List the shipped configs, or copy one.")
    parser.add_argument("name", nargs="?", help="the config to copy; without it, all are listed")
    parser.add_argument("destination", nargs="?", default=".", help="folder or file to copy it to (default: here)")
    given = parser.parse_args(arguments)
    if given.name is None:
        print("\n".join(listing()))
        return
    print(f"Copied to {copy(given.name, Path(given.destination))}")


def listing() -> list[str]:
    """Return a line for each config, with its name and what its first line says.

    Example:
        >>> from lightning_prune.cli import shipped_configs
        >>> [line for line in shipped_configs.listing() if "quickstart" in line][0].split()[:3]
        ['quickstart', 'Train', 'on']
    """
    paths = sorted(FOLDER.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    return [f"{path.stem.ljust(width)}  {_title(path)}" for path in paths]


def _title(config: Path) -> str:
    first_line = config.read_text().splitlines()[0]
    return first_line.removeprefix("# ")


def copy(name: str, destination: Path) -> Path:
    """Copy a config out of the package, as one file that stands alone.

    Args:
        name: Name of the config, with or without ``.yaml``.
        destination: The folder or the file to copy it to.

    Returns:
        The file.

    Raises:
        ValueError: If there is no such config.
        FileExistsError: If the file is there already.
        FileNotFoundError: If the folder of the file does not exist.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_prune.cli import shipped_configs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shipped_configs.copy("quickstart", Path(folder)).name
        'quickstart.yaml'
    """
    source = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if source.parent != FOLDER or not source.is_file():
        names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise ValueError(f"No config {name!r} ships with lightning-prune: choose one of {names}.")
    target = destination / source.name if destination.is_dir() else destination
    check_folder(target)
    text = _OTHER_FILE.sub(_inline, source.read_text())
    try:
        with target.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{str(target)!r} exists: give another name, or remove it first.") from None
    return target


def find(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which configs that are not there are those that ship.

    Args:
        arguments: The command line; what follows ``--config`` or ``-c`` may lack its ending.

    Example:
        >>> from lightning_prune.cli import shipped_configs
        >>> shipped_configs.find(["fit", "--trainer.max_epochs=3"])
        ['fit', '--trainer.max_epochs=3']
        >>> Path(shipped_configs.find(["fit", "--config", "quickstart"])[2]).name
        'quickstart.yaml'
    """
    result = []
    before = ""
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        names_config = before in _OPTIONS or option in _OPTIONS
        if names_config or value.endswith((".yaml", ".yml")):
            value = found(value)
        result.append(f"{option}{equals}{value}")
        before = argument
    return result


def found(config: str) -> str:
    """Return the shipped file for a config that is not there, with or without its ending; others as they are.

    Args:
        config: Path or name, such as ``configs/quickstart.yaml`` or ``quickstart``.
    """
    if os.path.isfile(config):  # which refuses no text, however long: a config may stand on the command line itself
        return config
    name = config.removeprefix("configs/")
    if not name.endswith((".yaml", ".yml")):
        name = f"{name}.yaml"
    inside = FOLDER / name
    return str(inside) if inside.is_file() else config


def _inline(found: re.Match[str]) -> str:
    """Return the content of a file that a config names, as a block of the config."""
    key, file = found.groups()
    lines = (FOLDER / file).read_text().splitlines()
    indented = [f"  {line}".rstrip() for line in lines]
    return "\n".join([f"{key}:", *indented])
