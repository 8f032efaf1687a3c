"""Files of measurements: one line each, so that an evaluation that was interrupted goes on where it was.

The journal stores results by key. Which key belongs to which candidate, model and batch is known to `notes`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Entry", "Journal"]


@dataclass(frozen=True)
class Entry:
    """What one candidate has reached on one batch.

    Attributes:
        loss: Mean loss over the samples of the batch.
        accuracy: Mean accuracy.
        samples: Number of samples in the batch.
    """

    loss: float
    accuracy: float
    samples: int


class Journal:
    """Measurements by key, one line of JSON each, in one file per rank.

    A line that was being written when the process was killed is dropped; lines are appended in one go.

    Args:
        folder: Where the files lie; it is made if it does not exist.
        rank: The rank of this process, which names the file that it writes.

    Raises:
        ValueError: If a file contains anything else.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> Journal(folder).add({"a": Entry(0.5, 1.0, 8)})
        >>> Journal(folder).entries
        {'a': Entry(loss=0.5, accuracy=1.0, samples=8)}
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
        lines = [_to_line(key, entry) for key, entry in entries.items()]
        content = "".join(lines).encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)


def _to_line(key: str, entry: Entry) -> str:
    return json.dumps([key, entry.loss, entry.accuracy, entry.samples]) + "\n"


def _from_line(line: bytes) -> tuple[str, Entry]:
    key, loss, accuracy, samples = json.loads(line)
    entry = Entry(float(loss), float(accuracy), int(samples))
    return str(key), entry


def _drop_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        end = content.rfind(b"\n") + 1
        os.truncate(path, end)


def _read(path: Path) -> dict[str, Entry]:
    entries = {}
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):  # another rank is writing it at this moment
            break
        try:
            key, entry = _from_line(line)
        except (ValueError, TypeError) as raised:
            raise ValueError(
                f"Line {number} of {str(path)!r} is no measurement: the file is damaged. Delete it to measure anew."
            ) from raised
        entries[key] = entry
    return entries
