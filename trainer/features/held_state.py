"""The state as it was at one moment, while the state itself goes on: rows are copied before they first change."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.features.states import SharedCounts, TakeRows


class HeldState:
    """Costs nothing when it begins, and then a copy of each row that changes."""

    def __init__(self, before: int, shared: SharedCounts) -> None:
        self.before = before
        """Takes of earlier seconds are counted."""
        self.shared = shared
        self._seen_S = np.zeros(64, bool)
        self._copies: list[TakeRows] = []
        self._place: dict[int, tuple[int, int]] = {}

    def keep(self, slots: NDArray[np.int64], key_S: NDArray[np.int64], rows: TakeRows) -> None:
        """Copy the rows of these slots, if they are as they were: to be called before they change.

        `key_S` names the item of each slot, 0 for one that is free.
        """
        if len(self._seen_S) < len(key_S):
            self._seen_S = np.concatenate([self._seen_S, np.zeros(len(key_S) - len(self._seen_S), bool)])
        new = np.unique(slots[~self._seen_S[slots]])
        self._seen_S[new] = True
        new = new[key_S[new] != 0]
        if not len(new):
            return
        self._place |= {key: (len(self._copies), place) for place, key in enumerate(key_S[new].tolist())}
        self._copies.append(rows.rows(new))

    def rows(self, keys: list[int], slot_of: Mapping[int, int], rows: TakeRows) -> TakeRows:
        """What was counted of these items then, as copies. `slot_of` and `rows` are those of now; slot 0 is empty."""
        slots = np.array([slot_of.get(key, 0) for key in keys], np.int64)
        seen = (slots < len(self._seen_S)) & self._seen_S[np.minimum(slots, len(self._seen_S) - 1)]
        found = rows.rows(np.where(seen, 0, slots))
        for number, key in enumerate(keys):
            if key in self._place:
                copy, place = self._place[key]
                for name, column in vars(found).items():
                    column[number] = getattr(self._copies[copy], name)[place]
        return found
