"""Impressions that a late take can still correct."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.samples.rows import NO_IMPRESSION, RELIABILITY, Impression, pack_impressions, row_bytes, unpack_impressions
from trainer.state import State, whole_numbers
from trainer.tables import Slots

_KEPT_BYTES = 200
"""What a row takes here beside `row_bytes`."""


class _Kept(NamedTuple):
    """An impression as snapshots hold it."""

    impression: Impression
    number: int
    """Running number, in the order of `add`."""
    named: bool = True
    """Whether a take that names its exposure finds it."""
    paired: bool = True
    """Whether an unnamed take of its user and item finds it."""
    features: bytes = b""
    """Those of its `Moment`, which come later."""


_FREE = _Kept(NO_IMPRESSION, -1)


class CorrectableRows:
    """Resolved impressions whose label or kind a late take can still change, oldest first.

    `windows` says for each kind of take how long after its exposure it counts, in seconds of event time; an impression
    is kept for the longest of them. Where they are more than `most_bytes` (an estimate from the lengths of histories
    and pictures alone, so that it is the same after a restart), the oldest that were not taken are removed first.
    """

    def __init__(
        self, windows: Mapping[BehaviourKind, float], *, most_bytes: float, most_rows: float, upgrades: bool
    ) -> None:
        self._windows = dict(windows)
        self._longest = max(windows.values())
        self._most_bytes, self._most_rows = most_bytes, most_rows
        self._upgrades = upgrades
        self._untaken: OrderedDict[tuple[int, int, int], Impression] = OrderedDict()
        self._taken: OrderedDict[tuple[int, int, int], Impression] = OrderedDict()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}
        self._kept: Slots[_Kept] = Slots()
        self._row_of: dict[tuple[int, int, int], int] = {}
        self._next = 0
        self._bytes = 0
        self.dropped = 0
        """Impressions removed before their time, because there were too many."""

    def __iter__(self) -> Iterator[Impression]:
        yield from self._untaken.values()
        yield from self._taken.values()

    def add(self, impression: Impression) -> None:
        """Add an impression that was resolved, or corrected."""
        if impression.label and not self._upgrades:
            return
        self._place(impression)
        named, paired = self._by_event.get(impression.shown_as), self._by_pair.get(_pair(impression))
        if named is not None:
            row = self._row_of[_key(named)]
            self._kept[row] = self._kept[row]._replace(named=False)
        if paired is not None:
            row = self._row_of[_key(paired)]
            self._kept[row] = self._kept[row]._replace(paired=False)
        self._by_event[impression.shown_as] = self._by_pair[_pair(impression)] = impression
        self._row_of[_key(impression)] = self._kept.add(
            _Kept(impression, self._next, features=impression.moment.features)
        )
        self._next += 1
        self._bytes += _size(impression)
        while self._bytes > self._most_bytes or len(self._untaken) + len(self._taken) > self._most_rows:
            self._remove(next(iter((self._untaken or self._taken).values())))
            self.dropped += 1

    def _place(self, impression: Impression) -> None:
        (self._taken if impression.label else self._untaken)[_key(impression)] = impression

    def note_features(self, impression: Impression) -> None:
        """Note that the features of an impression came, where it is kept, or a correction of it."""
        found = {
            _key(row): row
            for row in (self._by_event.get(impression.shown_as), self._by_pair.get(_pair(impression)))
            if row is not None and row.moment is impression.moment
        }
        for key in found:
            place = self._row_of[key]
            self._kept[place] = self._kept[place]._replace(features=impression.moment.features)

    def find(self, behaviour: Behaviour, item: int) -> Impression | None:
        """The impression of this take, whatever its kind; None if it is not kept (any more)."""
        if behaviour.exposure_id is not None:
            found = self._by_event.get(behaviour.exposure_id)
        else:
            found = self._by_pair.get((behaviour.user_id, item))
        return found if found is not None and (found.user_id, found.item) == (behaviour.user_id, item) else None

    def pop_corrected(self, behaviour: Behaviour, item: int, second: int) -> Impression | None:
        """Remove and return the impression that this take changes; None if it is too late, or says nothing new."""
        found = self.find(behaviour, item)
        if found is None or self.is_late(found, behaviour.kind, second):
            return None
        if found.taken_as is not None and RELIABILITY[behaviour.kind] <= RELIABILITY[found.taken_as]:
            return None
        self._remove(found)
        return found

    def is_late(self, impression: Impression, kind: BehaviourKind, second: int) -> bool:
        """Whether a take of this kind at `second` comes too late for the impression."""
        return impression.second + self._windows[kind] < second

    def forget_before(self, second: int) -> None:
        """Remove the impressions that are too old to be corrected by a take of this second."""
        for rows in (self._untaken, self._taken):
            while rows and (oldest := next(iter(rows.values()))).second + self._longest < second:
                self._remove(oldest)

    def forget(self, user_id: str) -> None:
        """Remove the impressions of a user."""
        for impression in [row for row in self if row.user_id == user_id]:
            self._remove(impression)

    def snapshot(self) -> State:
        """The impressions, and by which of the two keys a take finds each."""
        state = State(values={"dropped_early": self.dropped, "next": self._next})
        state.put_table("", self._kept.table(_packed, user_column="user_id"))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        rows, named, paired = unpack_impressions(state), state.arrays["named"], state.arrays["paired"]
        numbers = state.arrays.get("number", np.arange(len(rows)))  # an earlier build wrote them in their order
        columns = zip(rows, numbers.tolist(), named.tolist(), paired.tolist(), strict=True)
        kept = [
            None if number < 0 else _Kept(row, number, by_name, by_pair, row.moment.features)
            for row, number, by_name, by_pair in columns
        ]
        self._kept = Slots(kept)
        self._row_of = {_key(one.impression): place for place, one in enumerate(kept) if one}
        self._next = state.values.get("next", max(numbers.tolist(), default=-1) + 1)
        self._untaken, self._taken, self._bytes = OrderedDict(), OrderedDict(), 0
        self.dropped = state.values.get("dropped_early", 0)
        self._by_event, self._by_pair = {}, {}
        for one in sorted((one for one in kept if one), key=lambda one: one.number):
            row = one.impression
            self._place(row)
            self._bytes += _size(row)
            if one.named:
                self._by_event[row.shown_as] = row
            if one.paired:
                self._by_pair[_pair(row)] = row

    def _remove(self, impression: Impression) -> None:
        del (self._taken if impression.label else self._untaken)[_key(impression)]
        self._kept.pop(self._row_of.pop(_key(impression)))
        self._bytes -= _size(impression)
        if self._by_event.get(impression.shown_as) is impression:
            del self._by_event[impression.shown_as]
        if self._by_pair.get(_pair(impression)) is impression:
            del self._by_pair[_pair(impression)]


def _key(impression: Impression) -> tuple[int, int, int]:
    return impression.partition, impression.offset, impression.draw


def _pair(impression: Impression) -> tuple[str, int]:
    return impression.user_id, impression.item


def _packed(rows: Sequence[_Kept | None]) -> State:
    kept = [row or _FREE for row in rows]
    state = pack_impressions((row.impression for row in kept), features=[row.features for row in kept])
    state.arrays["number"] = whole_numbers(row.number for row in kept)
    state.arrays["named"] = np.array([row.named for row in kept], bool)
    state.arrays["paired"] = np.array([row.paired for row in kept], bool)
    return state


def _size(impression: Impression) -> int:
    return _KEPT_BYTES + row_bytes(impression)
