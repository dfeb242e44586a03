"""Impressions that a late take can still correct."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.samples.rows import RELIABILITY, Impression, pack_impressions, row_bytes, unpack_impressions
from trainer.state import State

_KEPT_BYTES = 200
"""What a row takes here beside `row_bytes`."""


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
        self._by_event[impression.shown_as] = impression
        self._by_pair[impression.user_id, impression.item] = impression
        self._bytes += _size(impression)
        while self._bytes > self._most_bytes or len(self._untaken) + len(self._taken) > self._most_rows:
            self._remove(next(iter((self._untaken or self._taken).values())))
            self.dropped += 1

    def _place(self, impression: Impression) -> None:
        (self._taken if impression.label else self._untaken)[_key(impression)] = impression

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
        state = pack_impressions(self)
        state.values["dropped_early"] = self.dropped
        state.arrays["named"] = np.array([self._by_event.get(row.shown_as) is row for row in self], bool)
        state.arrays["paired"] = np.array([self._by_pair.get((row.user_id, row.item)) is row for row in self], bool)
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        rows = unpack_impressions(state)
        self._untaken, self._taken, self._bytes = OrderedDict(), OrderedDict(), 0
        self.dropped = state.values.get("dropped_early", 0)
        marked = zip(rows, state.arrays["named"].tolist(), state.arrays["paired"].tolist(), strict=True)
        self._by_event, self._by_pair = {}, {}
        for row, named, paired in marked:
            self._place(row)
            self._bytes += _size(row)
            if named:
                self._by_event[row.shown_as] = row
            if paired:
                self._by_pair[row.user_id, row.item] = row

    def _remove(self, impression: Impression) -> None:
        del (self._taken if impression.label else self._untaken)[_key(impression)]
        self._bytes -= _size(impression)
        if self._by_event.get(impression.shown_as) is impression:
            del self._by_event[impression.shown_as]
        pair = (impression.user_id, impression.item)
        if self._by_pair.get(pair) is impression:
            del self._by_pair[pair]


def _key(impression: Impression) -> tuple[int, int, int]:
    return impression.partition, impression.offset, impression.draw


def _size(impression: Impression) -> int:
    return _KEPT_BYTES + row_bytes(impression)
