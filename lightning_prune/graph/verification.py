"""Verification of groups on smaller networks, before anyone relies on them."""

import itertools
import math
from collections.abc import Iterator, Sequence

from lightning_prune.graph.comparison import Expectations
from lightning_prune.graph.explanation import Explanation, Finding
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import Known, Record
from lightning_prune.graph.run import Forward
from lightning_prune.graph.trial import Pruned, Shrinking, Trial, TrialRunner

__all__ = ["Verifier"]


class Verifier:
    """Run networks with fewer channels and find what is not as in the full network.

    Args:
        forward: The forward pass.
        grouping: The groups to verify.
        tables: What operators say about channels.
        known: What the full network has shown.
    """

    def __init__(self, forward: Forward, grouping: Grouping, tables: OperatorTables, known: Known) -> None:
        self.runner = TrialRunner(forward, grouping, tables, known)
        self.expectations = Expectations(grouping, forward.labelled.count)
        self.groups = range(len(grouping.groups))

    def first_trial(self, training: bool, full: Record | None) -> Trial:
        """Run once with about half of the channels of all groups.

        Args:
            training: The mode to run in.
            full: What the full network showed in this mode, if that is known.
        """
        shrinking = Shrinking(self.groups, Pruned.SPREAD, training)
        return self.runner.run(shrinking, full)

    def looks_right(self, trial: Trial) -> bool:
        """Tell whether nothing fails in a trial that cannot be compared with the full network, nor is tied anew."""
        return not trial.failures and self.expectations.are_met(trial.record)

    def findings(self, trial: Trial) -> list[Finding]:
        """Return what goes wrong in the first trial or, if channels are cut, in more.

        A wrong place can be right by chance: a quarter of one half is one half of a quarter.
        """
        found = self._explain(trial)
        if found or not self.cuts(trial.full):
            return found
        for shrinking in _more_shrinkings(self.groups, trial.shrinking.training):
            another = self.runner.run(shrinking, trial.full)
            found = self._explain(another)
            if found:
                return found
        return []

    def cuts(self, full: Record) -> bool:
        """Tell whether channels of groups are cut somewhere."""
        return self.expectations.any_prunable(full.cut)

    def _explain(self, trial: Trial) -> list[Finding]:
        explanation = Explanation(self.runner, self.expectations, trial)
        return explanation.findings()


def _more_shrinkings(groups: Sequence[int], training: bool) -> Iterator[Shrinking]:
    """Prune either end of all groups, then some groups so that each has fewer channels where another has not."""
    yield Shrinking(groups, Pruned.FIRST, training)
    yield Shrinking(groups, Pruned.LAST, training)
    for some in _unlike_subsets(groups):
        yield Shrinking(some, Pruned.FIRST, training)


def _unlike_subsets(groups: Sequence[int]) -> list[list[int]]:
    """Return subsets such that all groups are in equally many of them, and no two in the same.

    Example:
        >>> _unlike_subsets(range(6))
        [[0, 1, 2], [0, 3, 4], [1, 3, 5], [2, 4, 5]]
        >>> _unlike_subsets([0])
        []
    """
    if len(groups) < 2:
        return []
    count = 2
    while math.comb(count, count // 2) < len(groups):
        count += 1
    subsets: list[list[int]] = [[] for _ in range(count)]
    memberships = itertools.combinations(subsets, count // 2)
    for group, subsets_of_group in zip(groups, memberships, strict=False):
        for subset in subsets_of_group:
            subset.append(group)
    return subsets
