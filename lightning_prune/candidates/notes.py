"""Notes of what has been measured: results are found again by the model, the batch and the candidate they are of.

Without a folder nothing is noted. How results are stored is the business of `Journal`.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.candidates.candidate import Candidate, digest
from lightning_prune.candidates.jobs import Job
from lightning_prune.candidates.journal import Entry, Journal
from lightning_prune.candidates.measures import Evaluate
from lightning_prune.graph.substitution import named_tensors

__all__ = ["Notes", "digest_of_values", "open_notes", "values_of_function"]


class Notes:
    """Notes that are not kept: nothing is found."""

    def begin_run(self, model: nn.Module, evaluate: Evaluate, compensate: str, batches: Sequence[Any]) -> None:
        """Say what is measured, and how.

        Args:
            model: The model that the candidates are of.
            evaluate: What measures loss and accuracy.
            compensate: How candidates are compensated.
            batches: What they are compensated on.
        """

    def begin_batch(self, batch: Any) -> None:
        """Turn to a batch."""

    def find(self, job: Job) -> list[Entry] | None:
        """Return what is known of the members of a job on this batch; None unless all are known."""
        return None

    def add(self, job: Job, entries: Sequence[Entry]) -> None:
        """Note what the members of a job have reached on this batch."""


class _NotesInFolder(Notes):
    """Notes in a journal.

    Args:
        journal: Where they are stored.
        candidates: A hash of each candidate.
    """

    def __init__(self, journal: Journal, candidates: Sequence[str]) -> None:
        self._journal = journal
        self._candidates = candidates
        self._run = ""
        self._batch = ""

    def begin_run(self, model: nn.Module, evaluate: Evaluate, compensate: str, batches: Sequence[Any]) -> None:
        tensors = list(named_tensors(model).items())
        measure = values_of_function(evaluate)
        self._run = digest_of_values((repr(model), tensors, measure, compensate, list(batches)))

    def begin_batch(self, batch: Any) -> None:
        self._batch = digest_of_values(batch)

    def find(self, job: Job) -> list[Entry] | None:
        entries = []
        for key in self._keys(job):
            if key not in self._journal.entries:
                return None
            entries.append(self._journal.entries[key])
        return entries

    def add(self, job: Job, entries: Sequence[Entry]) -> None:
        keys = self._keys(job)
        self._journal.add(dict(zip(keys, entries, strict=True)))

    def _keys(self, job: Job) -> list[str]:
        candidates = [self._candidates[member] for member in job.members]
        return [digest_of_values((self._run, self._batch, candidate)) for candidate in candidates]


def open_notes(folder: str | Path | None, rank: int, candidates: Sequence[Candidate]) -> Notes:
    """Return the notes in a folder, or notes that are not kept.

    Args:
        folder: Where the notes are; None for nowhere.
        rank: The rank of this process.
        candidates: The candidates, in the order in which jobs number them.

    Raises:
        ValueError: If a file in the folder is damaged.
    """
    if folder is None:
        return Notes()
    journal = Journal(folder, rank)
    return _NotesInFolder(journal, [digest(candidate) for candidate in candidates])


def values_of_function(function: Any) -> Any:
    """Return nested values that tell a function from others, in any process.

    Args:
        function: A function of a module, one that is made by another, or a ``partial`` of one. Numbers, text, tensors
            and functions that it refers to are told too.

    Raises:
        ValueError: If it refers to, or is, anything else.
    """
    if isinstance(function, partial):
        bound = [function.func, *function.args, *function.keywords.values()]
        return ["partial", *function.keywords, *map(values_of_function, bound)]
    if isinstance(function, FunctionType):
        name = [function.__module__, function.__qualname__]
        return name + [values_of_function(value) for value in _values_bound_to(function)]
    if isinstance(function, Tensor | str | int | float | type | BuiltinFunctionType | None):
        return function
    raise ValueError(
        f"Results cannot be noted in `resume`: {function!r} may be another one when the call goes on. Measure by a "
        "function of a module, or by a `partial` of one with numbers."
    )


def _values_bound_to(function: FunctionType) -> list[Any]:
    """Return the variables of outer functions that a function uses, and the defaults of its parameters."""
    closure = function.__closure__ or ()
    variables = [cell.cell_contents for cell in closure]
    defaults = function.__defaults__ or ()
    keyword_defaults = function.__kwdefaults__ or {}
    return [*variables, *defaults, *keyword_defaults.values()]


def digest_of_values(values: Any) -> str:
    """Return a hash of nested values: of the numbers in tensors, of the text of everything else."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            shape = tuple(leaf.shape)
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            sha.update(f"{leaf.dtype}{shape}".encode())
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()
