"""Impressions that a late take can still correct."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from schemas.behaviours import Behaviour
from trainer.samples.rows import Impression, pack_impressions, unpack_impressions
from trainer.state import State


class CorrectableRows:
    """The newest impressions that were resolved as not taken, oldest first.

    Each is kept for `seconds` of event time, and at most `rows` of them.
    """

    def __init__(self, seconds: float, rows: int) -> None:
        self._seconds = seconds
        self._rows = rows
        self._order: OrderedDict[tuple[int, int], Impression] = OrderedDict()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}

    def __iter__(self) -> Iterator[Impression]:
        return iter(self._order.values())

    def add(self, impression: Impression) -> None:
        """Add an impression; the oldest is removed where there are more than `rows`."""
        if not self._rows:
            return
        self._order[impression.partition, impression.offset] = impression
        self._by_event[impression.event_id] = impression
        self._by_pair[impression.user_id, impression.item] = impression
        while len(self._order) > self._rows:
            self._remove(next(iter(self._order.values())))

    def pop_answered(self, behaviour: Behaviour, item: int) -> Impression | None:
        """Remove and return the impression of this take, None if there is none."""
        if behaviour.exposure_id is not None:
            found = self._by_event.get(behaviour.exposure_id)
        else:
            found = self._by_pair.get((behaviour.user_id, item))
        if found is None or (found.user_id, found.item) != (behaviour.user_id, item):
            return None
        self._remove(found)
        return found

    def forget_before(self, second: int) -> None:
        """Remove the impressions that are too old to be corrected by a take of this second."""
        while self._order and (oldest := next(iter(self._order.values()))).second + self._seconds < second:
            self._remove(oldest)

    def forget(self, user_id: str) -> None:
        """Remove the impressions of a user."""
        for impression in [row for row in self if row.user_id == user_id]:
            self._remove(impression)

    def snapshot(self) -> State:
        """The impressions, and by which of the two keys a take finds each."""
        state = pack_impressions(self)
        state.arrays["named"] = np.array([self._by_event.get(row.event_id) is row for row in self], bool)
        state.arrays["paired"] = np.array([self._by_pair.get((row.user_id, row.item)) is row for row in self], bool)
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        rows = unpack_impressions(state)
        self._order = OrderedDict(((row.partition, row.offset), row) for row in rows)
        marked = zip(rows, state.arrays["named"].tolist(), state.arrays["paired"].tolist(), strict=True)
        self._by_event, self._by_pair = {}, {}
        for row, named, paired in marked:
            if named:
                self._by_event[row.event_id] = row
            if paired:
                self._by_pair[row.user_id, row.item] = row

    def _remove(self, impression: Impression) -> None:
        del self._order[impression.partition, impression.offset]
        if self._by_event.get(impression.event_id) is impression:
            del self._by_event[impression.event_id]
        pair = (impression.user_id, impression.item)
        if self._by_pair.get(pair) is impression:
            del self._by_pair[pair]
