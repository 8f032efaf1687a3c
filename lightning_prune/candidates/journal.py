"""What has been measured, in files: an evaluation that was interrupted goes on where it was."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Entry", "Journal", "description", "digest_of"]


class Entry(NamedTuple):
    """What one candidate has reached on one batch."""

    loss: float
    accuracy: float
    examples: int


class Journal:
    """Measurements by key, one line of JSON each, in one file per rank.

    A line that was being written when the process was killed is dropped; lines are appended in one piece.

    Args:
        folder: Where the files lie; it is made if it does not exist.
        rank: The rank of this process, which names the file that it writes.

    Raises:
        ValueError: If a file holds anything else.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> Journal(folder).add({"a": Entry(0.5, 1.0, 8)})
        >>> Journal(folder).entries
        {'a': Entry(loss=0.5, accuracy=1.0, examples=8)}
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.jsonl"
        _drop_unfinished_line(self.path)
        self.entries: dict[str, Entry] = {}
        for path in sorted(folder.glob("rank*.jsonl")):
            self.entries |= _read(path)

    def add(self, entries: dict[str, Entry]) -> None:
        """Append measurements to the file."""
        self.entries |= entries
        lines = "".join(json.dumps([key, *entry]) + "\n" for key, entry in entries.items())
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)


def _drop_unfinished_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _read(path: Path) -> dict[str, Entry]:
    entries = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # another rank is writing it at this moment
            break
        try:
            key, loss, accuracy, examples = json.loads(line)
            entries[str(key)] = Entry(float(loss), float(accuracy), int(examples))
        except (ValueError, TypeError) as raised:
            raise ValueError(
                f"Line {number} of {str(path)!r} is no measurement: the file is damaged. Delete it to measure anew."
            ) from raised
    return entries


def description(function: Any) -> Any:
    """Return nested values that tell a function from others, in any process.

    Args:
        function: A function of a module, one that is made by another, or a ``partial`` of one. Numbers, text, tensors
            and functions that it holds on to are told too.

    Raises:
        ValueError: If it holds on to, or is, anything else.
    """
    if isinstance(function, partial):
        held = [*function.args, *function.keywords.values()]
        return ["partial", *function.keywords, *map(description, [function.func, *held])]
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return [function.__module__, function.__qualname__, *map(description, held)]
    if isinstance(function, Tensor | str | int | float | type | BuiltinFunctionType | None):
        return function
    raise ValueError(
        f"Results cannot be noted in `resume`: {function!r} may be another one when the call goes on. Measure by a "
        "function of a module, or by a `partial` of one with numbers."
    )


def digest_of(values: Any) -> str:
    """Return a hash of nested values: of the numbers in tensors, of the text of everything else."""
    made = hashlib.sha256()
    leaves: Iterable[Any] = tree_leaves(values)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            made.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            made.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(leaf).encode())
    return made.hexdigest()
