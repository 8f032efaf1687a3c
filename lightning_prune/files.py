"""Files: written as a whole or not at all, and checkpoints that are read without running code."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint", "written_whole"]


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Let a file be written beside its place, and put it there once it is whole.

    Nothing is in its place, or what was there before, if writing fails or the process is killed.

    Args:
        path: Where the file belongs. Its folder is there already.

    Yields:
        The path to write to, in the same folder.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(f"{folder}/numbers.txt") as file:
        ...         _ = file.write_text("1, 2, 3")
        ...     Path(folder, "numbers.txt").read_text()
        '1, 2, 3'
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(descriptor)
    made = Path(name)
    try:
        yield made
        made.chmod(0o666 & ~_umask())  # temporary files are for their owner alone
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that a Trainer has written; only tensors and plain values, so that no code in it runs.

    Args:
        path: The file.
        map_location: Where to load tensors to.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds other objects, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as raised:  # whatever a damaged file makes of a program of pickle
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint: the file is damaged, or holds more than tensors and plain "
            "values."
        ) from raised
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{str(path)!r} is no checkpoint of a Lightning Trainer: it has no 'state_dict'.")
    return checkpoint


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
