"""Batches that are indexed by rows: dataclasses of tensors with the same first dimension."""

from dataclasses import fields
from typing import Any

from typing_extensions import Self

__all__ = ["Rows"]


class Rows:
    """Base of dataclasses whose fields all have one row for each item of a batch.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Pairs(Rows):
        ...     inputs: torch.Tensor
        ...     labels: torch.Tensor
        >>> Pairs(torch.arange(4), torch.arange(4) % 2)[torch.tensor([3, 0])]
        Pairs(inputs=tensor([3, 0]), labels=tensor([1, 0]))
    """

    def __getitem__(self, rows: Any) -> Self:
        """Return some rows of all fields."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name)[rows] for name in names})
