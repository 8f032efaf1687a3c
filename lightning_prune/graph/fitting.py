"""Fitting: which numbers that code shapes tensors by follow the channels, and which it has to be given others for.

A size may be an attribute of a module (``self.num_heads``), which is then changed; the count of channels that it stands
for; or left out. Where it is anything else, as where the width of the stream is taken for that of all heads, the module
runs with sizes that fit (see `lightning_prune.graph.resized`) and keeps its attributes.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lightning_prune.graph.channel_graph import Group
from lightning_prune.graph.counts import AttributeNumber, channels_counted
from lightning_prune.graph.records import Labels, Shaping
from lightning_prune.graph.sheets import Sheet
from lightning_prune.pruning_plan import Adaptation, Count, Site, Size

__all__ = ["OF_ATTENTION", "Fitting"]

OF_ATTENTION = frozenset({"heads", "query-key", "value"})
Attribute = tuple[str, str]  # name of the module, and of the attribute


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


@dataclass
class Fitting:
    """Find out what follows the channels of groups.

    Args:
        sheets: What the full network showed.
        groups: The groups of all sheets.
        resized: Names of modules whose attributes are to be left alone.

    Attributes:
        uses: What each attribute is a size of: the groups that the size is in proportion with.
    """

    sheets: Sequence[Sheet]
    groups: Mapping[str, Group]
    resized: frozenset[str] = frozenset()
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
                if site is not None:
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
        if count is None or written == -1:
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

    def _site(self, place: _Fitted) -> Site | None:
        """Return the place as plain values, if it is attention that has other sizes there."""
        given = self._given(place)
        changed = []
        for number, count in enumerate(place.counts):
            if count is None:
                continue
            if not self._is_right(place, number):
                changed.append(
                    Size(
                        number,
                        self._asked(place, number),
                        count,
                    )
                )
            elif count.groups:  # by which the place is known
                said = Count(-1) if place.first.sizes[number] == -1 else count
                changed.append(
                    Size(
                        number,
                        said,
                        said,
                    )
                )
        if place.first.function == "scale":
            last = len(place.first.shape) - 1
            given = tuple((axis, count) for axis, count in given if axis == last)
        followed = [name for _, count in given for name in count.groups]
        followed += [name for size in changed for name in size.fitting.groups]
        if not any(self.groups[name].kind in OF_ATTENTION for name in followed):
            return None
        first = place.first
        return Site(
            first.function,
            len(first.shape),
            given,
            len(first.sizes),
            tuple(changed),
            first.power,
        )

    def _given(self, place: _Fitted) -> tuple[tuple[int, Count], ...]:
        """Return the axes of the tensor that is given that are in proportion with groups, and their lengths."""
        given = []
        for axis, length in enumerate(place.first.shape):
            along = [seen.given.get(axis) for seen in place.seen]
            count = self.count(along, length)
            if count is not None and count.groups:
                given.append((axis, count))
        return tuple(given)
