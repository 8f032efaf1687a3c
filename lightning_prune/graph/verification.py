"""Verification of groups on smaller networks, before anyone relies on them."""

from collections.abc import Iterator, Sequence

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
        for each in self._trials(trial):
            found = self._explanation(each).findings()
            if found:
                return found
        return []

    def works(self, trial: Trial) -> bool:
        """Tell whether `findings` would find nothing, without a search for causes."""
        return not any(self._explanation(each).is_needed() for each in self._trials(trial))

    def _trials(self, first: Trial) -> Iterator[Trial]:
        yield first
        cut = self.expectations.groups_of(first.full.cut)
        if cut:
            for shrinking in _more_shrinkings(self.groups, cut, first.shrinking.training):
                yield self.runner.run(shrinking, first.full)

    def cuts(self, full: Record) -> bool:
        """Tell whether channels of groups are cut somewhere."""
        return self.expectations.any_prunable(full.cut)

    def _explanation(self, trial: Trial) -> Explanation:
        return Explanation(self.runner, self.expectations, trial)


def _more_shrinkings(groups: Sequence[int], cut: frozenset[int], training: bool) -> Iterator[Shrinking]:
    """Prune either end of all groups, then some so that each that is cut has fewer channels where another has not."""
    yield Shrinking(groups, Pruned.FIRST, training)
    yield Shrinking(groups, Pruned.LAST, training)
    others = [group for group in groups if group not in cut]
    alike = others[:1]  # stands for all of them: these need not be told from each other
    to_tell_apart = sorted(cut) + alike
    for some in unlike_subsets(to_tell_apart):
        smaller = set(some)
        if smaller.intersection(alike):
            smaller.update(others)
        shrinking = Shrinking(sorted(smaller), Pruned.FIRST, training)
        yield shrinking
