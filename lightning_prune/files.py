"""Files: written as a whole or not at all, and checkpoints that are read without running code."""

import errno
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["Unread", "check_folder", "full_disk_told", "read_checkpoint", "read_without_objects", "written_whole"]


def check_folder(path: Path) -> None:
    """Raise a FileNotFoundError unless there is a folder for a file.

    Args:
        path: Where the file belongs.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r}: make it first.")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_told(path: str | Path) -> Iterator[None]:
    """Let an error of a full disk name the file that was to be written.

    Args:
        path: The file.

    Raises:
        OSError: If no space is left for it.
    """
    try:
        yield
    except OSError as raised:
        if raised.errno not in _FULL:
            raise
        raise OSError(
            raised.errno, f"No space is left for {str(path)!r} on its device, or it would be too large a file there"
        ) from raised


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


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint that a Trainer has written; no code in it runs unless that is asked for.

    Args:
        path: The file.
        map_location: Where to load tensors to.
        weights_only: True to refuse a file that holds more than tensors and plain values; False to make whatever is in
            it, which runs its code; None to leave out what is neither, with an `Unread` in its place.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds what is refused, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}.")
    try:
        checkpoint = _read(path, map_location, weights_only)
    except Exception as raised:  # whatever a damaged file makes of a program of pickle
        raise ValueError(f"{str(path)!r} cannot be read as a checkpoint: {_why(raised, weights_only)}.") from raised
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{str(path)!r} is no checkpoint of a Lightning Trainer: it has no 'state_dict'.")
    return checkpoint


def _read(path: Path, map_location: Any, weights_only: bool | None) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only is not False)
    except pickle.UnpicklingError:
        if weights_only is not None:
            raise
        return read_without_objects(path, map_location)


def _why(raised: Exception, weights_only: bool | None) -> str:
    """Say why a file cannot be read."""
    if weights_only is False and isinstance(raised, ImportError | AttributeError):
        return f"what it holds is not to be found here ({raised}); import the module that defines it"
    if weights_only:
        return "the file is damaged, or holds more than tensors and plain values, which weights_only=True refuses"
    return "the file is damaged, or was not written by torch.save"


# -- what is no plain value --------------------------------------------------------------------------------------------

# What tensors and containers are made of again; none of it runs code that a file names.
_REBUILT = {
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray", "int", "float", "list", "dict", "tuple"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "device", "Tensor"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
}


class Unread:
    """Stands for an object in a file that is neither a tensor nor a plain value, and was therefore not made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Take what a list would."""

    def extend(self, values: Any) -> None:
        """Take what a list would."""

    def add(self, value: Any) -> None:
        """Take what a set would."""


class _Unpickler(pickle.Unpickler):
    """Make tensors and plain values, and `Unread` in the place of all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a file names, if it is known to be harmless."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        rebuilds = module == "torch._utils" and name.startswith("_rebuild_")
        if is_dtype or rebuilds or name in _REBUILT.get(module, ()):
            return super().find_class(module, name)
        return type(name, (Unread,), {"__module__": module})


class _Pickle:
    """What ``torch.load`` wants of a module that reads pickles."""

    __name__ = "pickle"
    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **settings: Any) -> Any:
        return _Unpickler(file, **settings).load()


def read_without_objects(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read what ``torch.save`` has written, with an `Unread` in the place of whatever is no tensor or plain value.

    No code in the file runs, and large files are not copied into memory before their tensors are used.

    Args:
        path: The file.
        map_location: Where to load tensors to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"size": 3, "net": torch.nn.Linear(2, 2)}, f"{folder}/a.ckpt")
        ...     content = read_without_objects(f"{folder}/a.ckpt")
        >>> content["size"], isinstance(content["net"], Unread)
        (3, True)
    """
    return torch.load(path, map_location=map_location, mmap=True, weights_only=False, pickle_module=_Pickle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
