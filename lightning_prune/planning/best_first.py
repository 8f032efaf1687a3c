"""All channels in one list, best first."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

__all__ = ["BestFirst"]


class BestFirst:
    """Rank all channels, best first; equal scores in the order of groups and channels, the same on every machine.

    Args:
        scores: (channels,) float64 score of each channel, for each group.

    Example:
        >>> import torch
        >>> ranking = BestFirst([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])])
        >>> ranking.widths(3), ranking.next_score(0, 1), ranking.worth(1, 2)
        (array([1, 2]), 1.0, 6.0)
    """

    def __init__(self, scores: Sequence[Tensor]) -> None:
        by_group = [values.numpy() for values in scores]
        sizes = [len(values) for values in by_group]
        group_of_channel = np.repeat(np.arange(len(sizes)), sizes)
        all_scores = np.concatenate([*by_group, np.zeros(0)])
        best_first = np.argsort(-all_scores, kind="stable")
        still_there = all_scores[best_first] > -math.inf
        self._groups = group_of_channel[best_first[still_there]]  # the group of each channel, best channel first
        self._descending = [np.sort(values)[::-1] for values in by_group]
        self._sums = [np.concatenate([np.zeros(1), values.cumsum()]) for values in self._descending]

    def __len__(self) -> int:
        return len(self._groups)

    def widths(self, best: int) -> np.ndarray:
        """Return how many channels of each group are among the best: (groups,)."""
        return np.bincount(self._groups[:best], minlength=len(self._descending))

    def next_score(self, group: int, width: int) -> float:
        """Return the score of the best channel of a group that is not kept at some width."""
        return float(self._descending[group][width])

    def worth(self, group: int, width: int) -> float:
        """Return the sum of the scores of the best channels of a group."""
        return float(self._sums[group][width])
