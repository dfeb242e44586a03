"""The newest takes of each user, from which pairs of items are counted, and which take a drawn exposure came from.

Letters: T takes of a step, V users (row 0 belongs to nobody), L history length.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.changed_rows import ChangedRows
from trainer.features.config import FeatureConfig
from trainer.features.states import NEVER
from trainer.state import Arrays, State, Table, copied_rows

_NOT_COUNTED = 0
_REMOVED_SHARE = 16


class UserTakes:
    """Rings of the last `history_length` counted takes; row numbers of users are their own business."""

    def __init__(self, config: FeatureConfig) -> None:
        self._length, self._most, self._remembered = config.history_length, config.max_users, config.remembered_takes
        self._row: dict[int, int] = {}
        self._free: list[int] = []  # a heap: the lowest is taken first, so that snapshots need not say which
        self._used = 1
        self._user_V = np.zeros(64, np.int64)
        self._item_VL = np.zeros((64, self._length), np.uint32)
        self._second_VL = np.full((64, self._length), NEVER, np.int64)
        self._count_V = np.zeros(64, np.int64)
        self._changed = ChangedRows()
        self._source: dict[int, int] = {}
        self._event_R = np.zeros(max(1, self._remembered), np.int64)
        self._source_row_R = np.zeros(max(1, self._remembered), np.int64)
        self._query_R = np.zeros(max(1, self._remembered), np.uint32)
        self._trigger_R = np.zeros(max(1, self._remembered), np.uint32)
        self._next_source = 0
        self._changed_sources = ChangedRows()

    def __len__(self) -> int:
        return len(self._row)

    def add(
        self, user_T: NDArray[np.int64], item_T: NDArray[np.uint32], second_T: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Append takes in order; returns the pairs of each with the takes in its user's ring before it: the place of
        the take among those given, and the item of the other.

        Items are `item_hash`es.
        """
        row_T = self._rows_of(user_T)
        order = np.argsort(row_T, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], np.diff(row_T[order]) > 0])) if len(order) else order
        sizes = np.diff(np.append(starts, len(order)))
        one, other = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
        for turn in range(int(sizes.max(initial=0))):  # the first takes of all users, then their second ones, ...
            take = order[starts[sizes > turn] + turn]
            row, item = row_T[take], item_T[take]
            before_TL = self._item_VL[row]
            held = np.flatnonzero(before_TL)
            one.append(take[held // self._length])
            other.append(before_TL.reshape(-1)[held])
            slot = self._count_V[row] % self._length
            self._item_VL[row, slot], self._second_VL[row, slot] = item, second_T[take]
            self._count_V[row] += 1
            self._changed.touch(row)
        return np.concatenate(one), np.concatenate(other)

    def remember(
        self,
        event_T: NDArray[np.int64],
        user_T: NDArray[np.int64],
        counted_T: NDArray[np.bool_],
        query_T: NDArray[np.uint32],
        trigger_T: NDArray[np.uint32],
    ) -> None:
        """Let drawn exposures name these takes; a take that is not counted has nothing to leave out.

        `query_T` and `trigger_T` are `item_hash`es of what was searched and of what was looked at before them.
        """
        kept = slice(max(0, len(event_T) - self._remembered), len(event_T))
        event_T, user_T, counted_T = event_T[kept], user_T[kept], counted_T[kept]
        if not len(event_T):
            return
        place_T = (self._next_source + np.arange(len(event_T))) % self._remembered
        for event, place in zip(self._event_R[place_T].tolist(), place_T.tolist(), strict=True):
            if self._source.get(event) == place:
                del self._source[event]
        self._source |= dict(zip(event_T.tolist(), place_T.tolist(), strict=True))
        self._event_R[place_T] = event_T
        self._query_R[place_T], self._trigger_R[place_T] = query_T[kept], trigger_T[kept]
        counted = zip(user_T.tolist(), counted_T.tolist(), strict=True)
        self._source_row_R[place_T] = [self._row[user] if has else _NOT_COUNTED for user, has in counted]
        self._changed_sources.touch(place_T)
        self._next_source += len(event_T)

    def rows_of(self, event_D: list[int]) -> NDArray[np.int64]:
        """For `beside`, per named take; 0 for one that was not counted, is not among the newest, or was never there."""
        place_D = np.array([self._source.get(event, -1) for event in event_D], np.int64)
        return np.where(place_D < 0, _NOT_COUNTED, self._source_row_R[place_D])

    def led_to(self, event_D: list[int]) -> NDArray[np.uint32]:
        """`item_hash` of search and trigger before each named take, shape (D, 2); 0 for a take that is not known."""
        place_D = np.array([self._source.get(event, -1) for event in event_D], np.int64)
        found_D2 = np.stack([self._query_R[place_D], self._trigger_R[place_D]], axis=1)
        return np.where(place_D[:, None] < 0, np.uint32(0), found_D2)

    def beside(
        self, row_D: NDArray[np.int64], item_D: NDArray[np.uint32], second_D: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        """The items that each named take is paired with, shape (D, L), 0 pads; none where the user is not kept."""
        item_DL, second_DL = self._item_VL[row_D], self._second_VL[row_D]
        own_DL = (item_DL == item_D[:, None]) & (second_DL == second_D[:, None])
        own_D = own_DL.argmax(axis=1)
        at = np.arange(len(row_D))
        item_DL[~own_DL[at, own_D]] = 0
        item_DL[at, own_D] = 0
        return item_DL

    def forget(self, user: int) -> None:
        """Remove a user's takes; what was counted from them stays counted."""
        row = self._row.pop(user, None)
        if row is not None:
            self._clear(np.array([row]))

    def delete(self, item: int) -> None:
        """Remove a deleted item, so that no new pair is counted with it."""
        gone = np.flatnonzero(self._item_VL == item)
        self._item_VL.reshape(-1)[gone], self._second_VL.reshape(-1)[gone] = 0, NEVER
        self._changed.touch(gone // self._length)

    def _rows_of(self, user_T: NDArray[np.int64]) -> NDArray[np.int64]:
        distinct, number_T = np.unique(user_T, return_inverse=True)
        missing = [user for user in distinct.tolist() if user not in self._row]
        if len(self._row) + len(missing) > self._most:
            self._remove_idle(len(self._row) + len(missing) - self._most, kept=distinct)
        for user in missing:
            row = self._row[user] = heapq.heappop(self._free) if self._free else self._new_row()
            self._user_V[row] = user
            self._changed.touch(row)
        return np.array([self._row[user] for user in distinct.tolist()], np.int64)[number_T]

    def _new_row(self) -> int:
        size = len(self._count_V)
        if self._used == size:
            more = min(size, self._most + 1)
            self._user_V = np.concatenate([self._user_V, np.zeros(more, np.int64)])
            self._item_VL = np.concatenate([self._item_VL, np.zeros((more, self._length), np.uint32)])
            self._second_VL = np.concatenate([self._second_VL, np.full((more, self._length), NEVER)])
            self._count_V = np.concatenate([self._count_V, np.zeros(more, np.int64)])
        self._used += 1
        return self._used - 1

    def _remove_idle(self, at_least: int, *, kept: NDArray[np.int64]) -> None:
        user_V, newest_V = self._user_V[: self._used], self._second_VL[: self._used].max(axis=1)
        rows = np.flatnonzero((user_V != 0) & ~np.isin(user_V, kept))
        order = np.lexsort((user_V[rows], newest_V[rows]))[: max(at_least, self._most // _REMOVED_SHARE)]
        for user in user_V[rows[order]].tolist():
            del self._row[user]
        self._clear(rows[order])

    def _clear(self, rows: NDArray[np.int64]) -> None:
        self._user_V[rows], self._item_VL[rows], self._second_VL[rows], self._count_V[rows] = 0, 0, NEVER, 0
        self._changed.touch(rows)
        for row in rows.tolist():
            heapq.heappush(self._free, row)

    def snapshot(self) -> State:
        """Everything."""
        state = State(values={"next_source": self._next_source})
        state.put_table("takes.", Table(self._used, self._changed, self._copied))
        sources = min(self._next_source, self._remembered)
        state.put_table("sources.", Table(sources, self._changed_sources, self._copied_sources))
        return state

    def _copied(self, rows: NDArray[np.int64]) -> Callable[[slice], State]:
        columns: Arrays = {"user": self._user_V, "items": self._item_VL}
        return copied_rows(columns | {"seconds": self._second_VL, "count": self._count_V}, rows)

    def _copied_sources(self, places: NDArray[np.int64]) -> Callable[[slice], State]:
        columns: Arrays = {"event": self._event_R, "row": self._source_row_R}
        return copied_rows(columns | {"query": self._query_R, "trigger": self._trigger_R}, places)

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        arrays = state.arrays
        self._user_V, self._count_V = arrays["takes.user"].copy(), arrays["takes.count"].copy()
        self._item_VL, self._second_VL = arrays["takes.items"].copy(), arrays["takes.seconds"].copy()
        self._used = len(self._user_V)
        self._row = {user: row for row, user in enumerate(self._user_V.tolist()) if user}
        self._free = [row for row in range(1, self._used) if not self._user_V[row]]
        self._changed, self._changed_sources = ChangedRows(), ChangedRows()
        self._next_source, count = state.values["next_source"], len(arrays["sources.event"])
        self._event_R[:count], self._event_R[count:] = arrays["sources.event"], 0
        self._source_row_R[:count], self._source_row_R[count:] = arrays["sources.row"], 0
        for own_R, name in ((self._query_R, "query"), (self._trigger_R, "trigger")):
            own_R[:count], own_R[count:] = arrays.get(f"sources.{name}", 0), 0  # earlier builds had none
        places = (np.arange(self._next_source - count, self._next_source) % max(1, self._remembered)).tolist()
        self._source = {int(self._event_R[place]): place for place in places}
