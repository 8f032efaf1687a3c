"""Verification of groups on smaller networks, before anyone relies on them."""

from collections.abc import Iterable, Iterator, Sequence

from lightning_prune.graph.comparison import Expectations
from lightning_prune.graph.explanation import Explanation, Finding
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import Known, Record
from lightning_prune.graph.run import Forward
from lightning_prune.graph.trial import Fitted, Pruned, Shrinking, Trial, TrialRunner, unlike_subsets

__all__ = ["Verifier"]


class Verifier:
    """Run networks with fewer channels and find what is not as in the full network.

    Args:
        forward: The forward pass.
        grouping: The groups to verify.
        tables: What operators say about channels.
        known: What the full network has shown.
        fitted: What follows the groups, and what else is pruned.
    """

    def __init__(
        self, forward: Forward, grouping: Grouping, tables: OperatorTables, known: Known, fitted: Fitted
    ) -> None:
        self.runner = TrialRunner(forward, grouping, tables, known, fitted)
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
        return not trial.failures and self.expectations.are_met(trial.record, trial.kept)

    def findings(self, trial: Trial) -> list[Finding]:
        """Return what goes wrong in the first trial or, if channels are cut, in more.

        A wrong place can be right by chance: a quarter of one half is one half of a quarter.
        """
        return self._first_found(self._trials(trial))

    def findings_at_once(self, trial: Trial) -> list[Finding]:
        """Return what goes wrong in the first trial or, if channels are cut, in others that prune all groups.

        Args:
            trial: The first trial; which size is that of which group has been told before.
        """
        return self._first_found(self._trials_at_once(trial))

    def _first_found(self, trials: Iterable[Trial]) -> list[Finding]:
        for each in trials:
            found = self._explanation(each).findings()
            if found:
                return found
        return []

    def works(self, trial: Trial) -> bool:
        """Tell whether `findings` would find nothing, without a search for causes."""
        return not any(self._explanation(each).is_needed() for each in self._trials(trial))

    def _trials(self, first: Trial) -> Iterator[Trial]:
        yield from self._trials_at_once(first)
        cut = self.expectations.groups_of(first.full.cut)
        if cut:
            for some in _subsets(self.groups, cut):
                yield self._another(first, Pruned.FIRST, some)

    def _trials_at_once(self, first: Trial) -> Iterator[Trial]:
        """Yield trials that prune some channels of all groups: anywhere and, where any are cut, at either end."""
        yield first
        if self.cuts(first.full):
            for end in (Pruned.FIRST, Pruned.LAST):
                yield self._another(first, end, self.groups)

    def _another(self, first: Trial, pruned: Pruned, groups: Sequence[int]) -> Trial:
        shrinking = Shrinking(groups, pruned, first.shrinking.training)
        return self.runner.run(shrinking, first.full)

    def cuts(self, full: Record) -> bool:
        """Tell whether channels of groups are cut somewhere."""
        return self.expectations.any_prunable(full.cut)

    def _explanation(self, trial: Trial) -> Explanation:
        return Explanation(self.runner, self.expectations, trial)


def _subsets(groups: Sequence[int], cut: frozenset[int]) -> Iterator[list[int]]:
    """Yield some groups, so that each that is cut is among them where another is not."""
    others = [group for group in groups if group not in cut]
    alike = others[:1]  # stands for all of them: these need not be told from each other
    to_tell_apart = sorted(cut) + alike
    for some in unlike_subsets(to_tell_apart):
        smaller = set(some)
        if smaller.intersection(alike):
            smaller.update(others)
        yield sorted(smaller)
