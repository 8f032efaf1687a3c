"""Adaptations: the numbers that a module computes shapes with, which follow the channels of groups."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

__all__ = ["Adaptation", "Count", "Shares", "Site", "Size"]

Shares = Mapping[str, Fraction]
"""How much of the channels of each group is kept, by name; of groups that are absent all are."""


@dataclass(frozen=True)
class Count:
    """A number that counts channels of groups, or multiples of them.

    Attributes:
        original: What it is in the original model.
        groups: Names of the groups; it is in proportion with the channels of each.

    Example:
        >>> Count(768, ("attn#heads", "attn")).now({"attn#heads": Fraction(1, 2), "attn": Fraction(3, 4)})
        288
    """

    original: int
    groups: tuple[str, ...] = ()

    def now(self, shares: Shares) -> int:
        """Return what the number is when a share of the channels is kept."""
        number = Fraction(self.original)
        for group in self.groups:
            number *= shares.get(group, 1)
        return int(number)


@dataclass(frozen=True)
class Size:
    """A size that code gives to a function, and the one that fits the channels.

    Attributes:
        place: Which of the sizes it is.
        asked: What the code says.
        fitting: What has to be said instead.
    """

    place: int
    asked: Count
    fitting: Count


@dataclass(frozen=True)
class Site:
    """A place where a module shapes a tensor, or scales attention by the width of heads.

    Attributes:
        function: ``"shape"`` for sizes along all axes, ``"split"`` for those of pieces of one axis, ``"scale"`` for
            attention that is scaled by the root of what it is given.
        axes: How many axes the tensor has that is given.
        given: Lengths of some of these axes: (axis, length).
        sizes: How many sizes the code gives.
        changed: Those of them that are in proportion with channels.
    """

    function: str
    axes: int
    given: tuple[tuple[int, Count], ...]
    sizes: int = 0
    changed: tuple[Size, ...] = ()

    def counts(self) -> Iterator[Count]:
        """Yield the numbers that follow channels."""
        for _, count in self.given:
            yield count
        for size in self.changed:
            yield size.asked
            yield size.fitting


@dataclass(frozen=True)
class Adaptation:
    """What has to be adapted in a module when channels of groups are pruned.

    Attributes:
        numbers: Attributes of it that count channels; of a list or tuple one entry, ``"sizes.1"``.
        sites: Places where its code computes with other numbers, which are replaced as it runs.
    """

    numbers: tuple[tuple[str, Count], ...] = ()
    sites: tuple[Site, ...] = ()

    def groups(self) -> set[str]:
        """Return the names of the groups that it follows."""
        found: set[str] = set()
        for count in self._counts():
            found.update(count.groups)
        return found

    def _counts(self) -> Iterator[Count]:
        for _, count in self.numbers:
            yield count
        for site in self.sites:
            yield from site.counts()

    def renamed(self, rename: Callable[[str], str]) -> "Adaptation":
        """Return it with other names of groups.

        Args:
            rename: Gives the new name of a group.
        """

        def of_count(count: Count) -> Count:
            return replace(count, groups=tuple(map(rename, count.groups)))

        def of_size(size: Size) -> Size:
            return replace(size, asked=of_count(size.asked), fitting=of_count(size.fitting))

        numbers = tuple((name, of_count(count)) for name, count in self.numbers)
        sites = []
        for site in self.sites:
            given = tuple((axis, of_count(count)) for axis, count in site.given)
            changed = tuple(map(of_size, site.changed))
            sites.append(replace(site, given=given, changed=changed))
        return Adaptation(numbers, tuple(sites))
