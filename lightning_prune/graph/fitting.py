"""Fitting: which numbers that code shapes tensors by follow the channels, and which it has to be given others for.

A size may be an attribute of a module (``self.num_heads``), which is then changed; the count of channels that it stands
for; or left out. Where it is anything else, as where the width of the stream is taken for that of all heads, the module
runs with sizes that fit (see `lightning_prune.graph.resized`) and keeps its attributes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_prune.graph.channel_graph import Group
from lightning_prune.graph.counts import CHECK, AttributeNumber, channels_counted
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.records import Labels, Shaping, Tie
from lightning_prune.graph.sheets import Sheet
from lightning_prune.pruning_plan import THE_REST, Adaptation, Count, Site, Size

__all__ = ["OF_ATTENTION", "Fitting", "widths_to_tie"]

OF_ATTENTION = frozenset({"heads", "query-key", "value"})
Attribute = tuple[str, str]  # name of the module, and of the attribute
_Origin = tuple[Any, ...]  # of a number of code: name of the module, and what tells it from others
_AS_WIDE = "is as wide as others, by one number of code"


@dataclass(frozen=True)
class _Fitted:
    """A place that shapes a tensor, as all sheets have it.

    Attributes:
        seen: The place in each sheet.
        counts: What each size there has to be; None where it is in proportion with nothing.
    """

    seen: Sequence[Shaping]
    counts: Sequence[Count | None]

    @property
    def first(self) -> Shaping:
        """The place in the first sheet."""
        return self.seen[0]


def _kind(place: Shaping) -> tuple[str, str, int, int]:
    """Return all but the numbers by which a module that runs knows a place."""
    return place.module, place.function, len(place.shape), len(place.sizes)


@dataclass
class Fitting:
    """Find out what follows the channels of groups.

    Args:
        sheets: What the full network showed.
        groups: The groups of all sheets.
        resized: Names of modules whose attributes are to be left alone.
        splitting: Names of modules that are given the sizes to split an axis by, whatever channels it has.

    Attributes:
        uses: What each attribute is a size of: the groups that the size is in proportion with.
    """

    sheets: Sequence[Sheet]
    groups: Mapping[str, Group]
    resized: frozenset[str] = frozenset()
    splitting: frozenset[str] = frozenset()
    uses: dict[Attribute, set[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(set))

    def adaptations(self) -> dict[str, Adaptation]:
        """Return what has to be adapted in modules, by their names."""
        places = list(self._places())
        for place in places:
            self._note_uses(place)
        sites: dict[str, dict[Site, None]] = defaultdict(dict)
        for place in places:
            if self._needs_others(place):
                site = self._site(place)
                if site is not None and self._is_told_apart(site, place, places):
                    sites[place.first.module][site] = None
        numbers = self._numbers()
        return {
            module: Adaptation(tuple(numbers.get(module, ())), tuple(sites.get(module, ())))
            for module in dict.fromkeys([*numbers, *sites])
        }

    def _places(self) -> Iterator[_Fitted]:
        """Yield the places where sizes are in proportion with groups, or attributes are sizes of something."""
        for seen in zip(*(sheet.record.shapings for sheet in self.sheets), strict=False):
            counts = []
            for place in range(len(seen[0].labels)):
                along = [one.labels[place] for one in seen]
                length = next((len(labels) for labels in along if labels is not None), -1)
                written = seen[0].sizes[place]
                counts.append(self.count(along, length if length >= 0 else int(written)))
            yield _Fitted(seen, counts)

    def count(self, along: Sequence[Labels | None], length: int) -> Count | None:
        """Return the length of an axis, None where it is in proportion with nothing.

        Args:
            along: The labels along it, by sheet.
            length: What it is in the full network.
        """
        names: list[str] = []
        for sheet, labels in zip(
            self.sheets,
            along,
            strict=True,
        ):
            if labels is None:
                continue
            numbers = torch.unique(torch.from_numpy(sheet.grouping.group_of[labels.numpy()]))
            if len(numbers) > 1:
                return None
            number = int(numbers[0])
            if number >= 0 and sheet.names[number]:
                names.append(sheet.names[number])
        return Count(length, tuple(dict.fromkeys(names)))

    # -- what is an attribute ---------------------------------------------------------------------------------------

    def _note_uses(self, place: _Fitted) -> None:
        for written, count in zip(
            place.first.sizes,
            place.counts,
            strict=True,
        ):
            if isinstance(written, AttributeNumber) and count is not None:
                self.uses[written.module, written.attribute].add(count.groups)

    def _follows(self, attribute: Attribute) -> bool:
        """Tell whether an attribute can be changed wherever it is a size."""
        if attribute[0] in self.resized or attribute in self.sheets[0].record.computed_with:
            return False
        return len(self.uses[attribute]) == 1

    def _numbers(self) -> dict[str, list[tuple[str, Count]]]:
        """Return the attributes that follow channels, by module."""
        numbers: dict[str, dict[str, Count]] = defaultdict(dict)
        for place in self._places():
            for written, count in zip(
                place.first.sizes,
                place.counts,
                strict=True,
            ):
                if not isinstance(written, AttributeNumber) or count is None or not count.groups:
                    continue
                if self._follows((written.module, written.attribute)):
                    numbers[written.module][written.attribute] = Count(int(written), count.groups)
        return {module: list(counts.items()) for module, counts in numbers.items()}

    # -- what is not ------------------------------------------------------------------------------------------------

    def _needs_others(self, place: _Fitted) -> bool:
        """Tell whether the code has to be given other sizes there, or another scale."""
        if place.first.function == "scale":
            return True
        return any(not self._is_right(place, number) for number in range(len(place.counts)))

    def _is_right(self, place: _Fitted, number: int) -> bool:
        """Tell whether a size becomes what it has to be by itself, or by an attribute."""
        count, written = place.counts[number], place.first.sizes[number]
        if count is None:
            return not self._is_given_sizes(place) or self._is_counted(place, number)
        if written == -1:
            return True
        if isinstance(written, AttributeNumber) and self._follows((written.module, written.attribute)):
            return True
        return set(self._asked(place, number).groups) == set(count.groups)

    def _asked(self, place: _Fitted, number: int) -> Count:
        """Return what the code says a size is."""
        written = place.first.sizes[number]
        if isinstance(written, AttributeNumber) and self._follows((written.module, written.attribute)):
            groups = next(iter(self.uses[written.module, written.attribute]))
            return Count(int(written), groups)
        counted = []
        for sheet, seen in zip(
            self.sheets,
            place.seen,
            strict=True,
        ):
            counted.append(channels_counted(seen.sizes[number], sheet.record))
        count = self.count(counted, int(written)) or Count(int(written))
        times = max(getattr(seen.sizes[number], "times", 1) for seen in place.seen)
        return replace(count, times=times)

    def _is_given_sizes(self, place: _Fitted) -> bool:
        """Tell whether a place splits an axis that need not be of attention."""
        return place.first.function == "split" and place.first.module in self.splitting

    @staticmethod
    def _is_counted(place: _Fitted, number: int) -> bool:
        """Tell whether code takes a size from what it is the size of."""
        first = place.first
        counted = getattr(first.sizes[number], "labels", None)
        along = first.labels[number]
        if counted is None or along is None:
            return False
        return torch.equal(counted, along)

    def _is_told_apart(self, site: Site, place: _Fitted, places: Sequence[_Fitted]) -> bool:
        """Tell whether no other place in a module could be mistaken for one that is not of attention."""
        if self._is_of_attention(site):
            return True
        kind = _kind(place.first)
        for other in places:
            if _kind(other.first) != kind or self._asks_otherwise(other, site):
                continue
            there = self._site(other)
            if there != site:
                return False
        return True

    def _asks_otherwise(self, place: _Fitted, site: Site) -> bool:
        """Tell whether the code says another number there than at a site, whatever is pruned."""
        for size in site.changed:
            asked = self._asked(place, size.place)
            if asked.groups or size.asked.groups:
                continue
            if asked.original != size.asked.original:
                return True
        return False

    def _is_of_attention(self, site: Site) -> bool:
        followed = [count for _, count in site.given]
        followed += [size.fitting for size in site.changed]
        for count in followed:
            kinds = {self.groups[name].kind for name in count.groups}
            if kinds & OF_ATTENTION:
                return True
        return False

    def _site(self, place: _Fitted) -> Site | None:
        """Return the place as plain values, if it is attention or may be given other sizes for another reason."""
        first = place.first
        if first.function == CHECK:
            return None
        given = self._given(place)
        if first.function == "scale":
            last = len(first.shape) - 1
            given = tuple((axis, count) for axis, count in given if axis == last)
        changed: list[Size] = []
        for number in range(len(place.counts)):
            size = self._size(place, number)
            if size is not None:
                changed.append(size)
        site = Site(
            first.function,
            len(first.shape),
            given,
            len(first.sizes),
            tuple(changed),
            first.power,
        )
        if self._is_given_sizes(place) and self._is_of_whole_groups(changed):
            return site
        return site if self._is_of_attention(site) else None

    def _size(self, place: _Fitted, number: int) -> Size | None:
        """Return what the code says that a size is, and what it has to be; None if it is always the same."""
        count, written = place.counts[number], place.first.sizes[number]
        if not self._is_right(place, number):
            fitting = THE_REST if count is None else count
            asked = self._asked(place, number)
            return Size(
                number,
                asked,
                fitting,
            )
        if count is None or not count.groups:
            return None
        said = Count(-1) if written == -1 else count  # by which the place is known
        return Size(number, said, said)

    def _is_of_whole_groups(self, sizes: Sequence[Size]) -> bool:
        """Tell whether sizes, but for one at most, are those of all channels of groups."""
        rests = 0
        for size in sizes:
            fitting = size.fitting
            if fitting == THE_REST:
                rests += 1
                continue
            channels = 1
            for name in fitting.groups:
                channels *= self.groups[name].size
            if fitting.original % channels:
                return False
        return rests <= 1

    def _given(self, place: _Fitted) -> tuple[tuple[int, Count], ...]:
        """Return the axes of the tensor that is given that are in proportion with groups, and their lengths."""
        given = []
        for axis, length in enumerate(place.first.shape):
            along = [seen.given.get(axis) for seen in place.seen]
            count = self.count(along, length)
            if count is not None and count.groups:
                given.append((axis, count))
        return tuple(given)


def widths_to_tie(places: Iterable[Shaping], grouping: Grouping, found: frozenset[int]) -> list[Tie]:
    """Return what ties groups whose widths are one number of code, which can follow them if they are pruned together.

    Args:
        places: Where code shapes tensors.
        grouping: The groups.
        found: Numbers of the groups in which something did not work; a number is the width of one of them at least.
    """
    widths: dict[_Origin, dict[int, Labels]] = defaultdict(dict)
    for place in places:
        for number, labels in enumerate(place.labels):
            if labels is None or len(labels) != place.sizes[number]:
                continue
            group = int(grouping.group_of[labels[0]])
            if group >= 0 and _is_whole(grouping, group, labels):
                widths[_origin(place, number)].setdefault(group, labels)
    ties = []
    for (module, *_), same in widths.items():
        if found.isdisjoint(same):
            continue
        first, *others = same.values()
        ties += [Tie(first, labels, module, _AS_WIDE) for labels in others]
    return ties


def _is_whole(grouping: Grouping, group: int, labels: Labels) -> bool:
    """Tell whether labels are those of all channels of a group, each as often, and of no other."""
    axis = grouping.axis(labels)
    name = grouping.names[group]
    channels = dict(axis.groups)[name] * grouping.groups[name].size
    return channels == len(labels)


def _origin(place: Shaping, number: int) -> _Origin:
    """Return what tells a number of code from others: the attribute that it is or, as far as is known, its place."""
    written = place.sizes[number]
    if isinstance(written, AttributeNumber):
        return written.module, written.attribute
    return *_kind(place), number, int(written)
