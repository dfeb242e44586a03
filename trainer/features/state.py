"""The state behind the features of the moment: what the takes so far left behind, by item and by user.

A row sees the state as of the step before: its features are computed first, then the takes before the second of the
step's last row are added. A take of that very second waits for the next step, so no row sees its own take.

Letters: T takes of a step, I item numbers, S slots of items that were taken (slot 0 belongs to none), U distinct items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.features.config import HALF_LIVES, FeatureConfig
from trainer.features.partners import count_pairs
from trainer.features.states import (
    CATEGORY_SLOTS,
    NEVER,
    WORD_SLOTS,
    DrawnSources,
    ItemStates,
    SharedCounts,
    TakeRows,
    item_hash,
)
from trainer.features.user_takes import UserTakes
from trainer.samples.item_facts import FactRows
from trainer.state import State

_EVICTED_SHARE = 16
_TAKES_AT_ONCE = 64
"""Takes that are counted together: of their new pairs a full list of partners accepts one."""
_SWEPT_ROWS = 4_096
"""Lists of partners that are searched for deleted items at each step."""


class FeatureItems(Protocol):
    """Items by number, of which 0 is padding."""

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Two hashes of each id, shape (n, 2), zeros for padding."""
        ...

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        """What is known of each item beside its takes."""
        ...


@dataclass(frozen=True, eq=False)
class TakeColumns:
    """Takes to add, in any order; users and events by a 63-bit hash of their ids."""

    user_T: NDArray[np.int64]
    item_T: NDArray[np.int64]
    """Item numbers."""
    second_T: NDArray[np.int64]
    event_T: NDArray[np.int64]
    """The takes' own events, by which drawn exposures name them."""
    announces_T: NDArray[np.bool_]
    """The item's time of publication was inferred from this take, so it is counted nowhere."""

    def __len__(self) -> int:
        return len(self.user_T)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> TakeColumns:
        """These takes, in this order."""
        return TakeColumns(
            self.user_T[rows], self.item_T[rows], self.second_T[rows], self.event_T[rows], self.announces_T[rows]
        )


class FeatureState:
    """Bounded state of all items and users; every verb is a function of what was added before, in steps."""

    def __init__(self, config: FeatureConfig, items: FeatureItems) -> None:
        self.config = config
        self.before = NEVER
        """Takes of earlier seconds are counted."""
        self._items = items
        self._users = UserTakes(config)
        self._shared = SharedCounts.empty()
        self._slot_I = np.zeros(64, np.int32)
        self._rows = TakeRows.empty(config, 64)
        self._number_S = np.zeros(64, np.int64)
        self._used = 1
        self._free: list[int] = []
        self._deleted: dict[int, int] = {}
        """Hash of a deleted item -> the slot up to which lists were searched for it."""

    # ---- reading -------------------------------------------------------------------------------------------------

    def states(self, numbers_U: NDArray[np.int64]) -> ItemStates:
        """What features read of these items, as copies; a number of 0 gives padding."""
        return ItemStates(
            item_hash(self._items.hashes(numbers_U)),
            self._items.facts(numbers_U),
            self._rows.rows(self._slots(numbers_U)),
            self._shared,
            self.before,
        )

    def sources(
        self, target_B: NDArray[np.int64], source_B: NDArray[np.int64], second_B: NDArray[np.int64]
    ) -> DrawnSources:
        """What features leave out of rows that were drawn.

        `target_B` are item numbers; `source_B` and `second_B` name event (0 for a row that was not drawn) and second of
        the take that each target was drawn from.
        """
        drawn = np.flatnonzero(source_B)
        row_D = self._users.rows_of(source_B[drawn].tolist())
        drawn, row_D = drawn[row_D != 0], row_D[row_D != 0]
        if not len(drawn):
            return DrawnSources.none(len(target_B))
        seconds_B = np.full(len(target_B), NEVER, np.int64)
        seconds_B[drawn] = second_B[drawn]
        beside_DL = self._users.beside(row_D, target_B[drawn], second_B[drawn])
        partner_BL = np.zeros((len(target_B), beside_DL.shape[1]), np.uint32)
        hashes = item_hash(self._items.hashes(beside_DL.ravel())).reshape(beside_DL.shape)
        partner_BL[drawn] = np.where(beside_DL > 0, hashes, 0)
        return DrawnSources(seconds_B, partner_BL)

    # ---- counting ------------------------------------------------------------------------------------------------

    def add(self, takes: TakeColumns, *, before: int) -> NDArray[np.int64]:
        """Count the takes of one step, all of seconds before `before`; returns the numbers of the items that changed.

        The order in which they are given does not matter.
        """
        self.before = max(self.before, before)
        self._sweep()
        takes = takes.select(np.lexsort((takes.event_T, takes.user_T, takes.second_T)))
        starts = range(0, len(takes), _TAKES_AT_ONCE)
        changed = [self._add(takes.select(slice(start, start + _TAKES_AT_ONCE))) for start in starts]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *changed]))

    def _add(self, takes: TakeColumns) -> NDArray[np.int64]:
        counted = takes.select(~takes.announces_T)
        changed = np.zeros(0, np.int64)
        if len(counted):
            one, other = self._users.add(counted.user_T, counted.item_T, counted.second_T)
            self._count_shared(counted.item_T)
            self._admit(np.unique(counted.item_T))
            self._count_takes(counted)
            changed = self._number_S[self._count_together(one, other)]
            changed = np.unique(np.concatenate([changed, counted.item_T]))
        self._users.remember(takes.event_T, takes.user_T, ~takes.announces_T)
        return changed

    def _count_shared(self, item_T: NDArray[np.int64]) -> None:
        facts = self._items.facts(item_T)
        words = facts.words_IW[facts.words_IW > 0]
        self._shared = replace(
            self._shared,
            category_C=_counted(self._shared.category_C, facts.category_I % CATEGORY_SLOTS),
            word_C=_counted(self._shared.word_C, words % WORD_SLOTS),
            takes=self._shared.takes + len(item_T),
        )

    def _count_takes(self, takes: TakeColumns) -> None:
        """Takes in order of time, so that sums do not depend on how they came."""
        slot_T = self._slots(takes.item_T)
        order = np.argsort(slot_T, kind="stable")
        slot_T, second_T = slot_T[order], takes.second_T[order]
        slot_S, first_S, number_T = np.unique(slot_T, return_index=True, return_inverse=True)
        count_S = np.diff(np.append(first_S, len(slot_T)))
        end_S = first_S + count_S - 1
        rows = self._rows
        old_last_S, old_previous_S = rows.last_U[slot_S], rows.previous_U[slot_S]
        last_S = np.maximum(old_last_S, second_T[end_S])
        for place, half_life in enumerate(HALF_LIVES.values()):
            idle_S = last_S - np.where(old_last_S > NEVER, old_last_S, last_S)
            left_S = rows.decayed_UH[slot_S, place].astype(np.float64) * np.exp2(-idle_S / half_life)
            weight_T = np.exp2(-(last_S[number_T] - second_T) / half_life)
            rows.decayed_UH[slot_S, place] = left_S + np.add.reduceat(weight_T, first_S)
        newest_S2 = np.stack([second_T[end_S], np.where(count_S > 1, second_T[np.maximum(end_S - 1, 0)], NEVER)], 1)
        four_S4 = np.sort(np.concatenate([newest_S2, old_last_S[:, None], old_previous_S[:, None]], axis=1), axis=1)
        rows.last_U[slot_S], rows.previous_U[slot_S] = four_S4[:, 3], four_S4[:, 2]
        rows.takes_U[slot_S] += count_S.astype(np.uint32)

    def _count_together(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
        """Both sides of each pair, once where an item meets itself; returns the slots that changed."""
        apart = one != other
        item = np.concatenate([one, other[apart]])
        partner = np.concatenate([other, one[apart]])
        slot = self._slots(item)
        kept = slot > 0  # an item that lost its counts since has no list
        distinct, number = np.unique(partner[kept], return_inverse=True)
        return count_pairs(self._rows, slot[kept], item_hash(self._items.hashes(distinct))[number])

    # ---- admission, eviction, deletion ---------------------------------------------------------------------------

    def _slots(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        known = np.where(numbers < len(self._slot_I), numbers, 0)
        return self._slot_I[known].astype(np.int64)

    def _admit(self, numbers: NDArray[np.int64]) -> None:
        """Give slots to items taken for the first time; where none is left, take those of the longest untaken."""
        if len(numbers) and numbers[-1] >= len(self._slot_I):
            more = max(len(self._slot_I), int(numbers[-1]) + 1 - len(self._slot_I))
            self._slot_I = np.concatenate([self._slot_I, np.zeros(more, np.int32)])
        new = numbers[self._slots(numbers) == 0]
        short = self._used - 1 - len(self._free) + len(new) - self.config.max_items
        if short > 0:
            self._evict(max(short, self.config.max_items // _EVICTED_SHARE), kept=numbers)
        for number in new.tolist():
            slot = self._free.pop() if self._free else self._new_slot()
            self._slot_I[number], self._number_S[slot] = slot, number

    def _new_slot(self) -> int:
        if self._used == len(self._number_S):
            size, more = self._used, min(2 * self._used, self.config.max_items + 1)
            rows = TakeRows.empty(self.config, max(more, size + 1))
            for name, column in vars(self._rows).items():
                getattr(rows, name)[:size] = column
            self._rows = rows
            self._number_S = np.concatenate([self._number_S, np.zeros(len(rows) - size, np.int64)])
        self._used += 1
        return self._used - 1

    def _evict(self, most: int, *, kept: NDArray[np.int64]) -> None:
        held = np.flatnonzero(self._number_S > 0)
        held = held[~np.isin(self._number_S[held], kept)]
        self._empty(held[np.lexsort((self._number_S[held], self._rows.last_U[held]))][:most])

    def _empty(self, slots: NDArray[np.int64]) -> None:
        self._slot_I[self._number_S[slots]] = 0
        self._number_S[slots] = 0
        self._rows.clear(slots)
        self._free += slots.tolist()

    def delete(self, number: int) -> None:
        """Remove a deleted item's counts; lists of partners lose it in the steps that follow, some lists in each."""
        one = np.array([number])
        slots = self._slots(one)
        self._empty(slots[slots > 0])
        self._users.delete(one)
        self._deleted[int(item_hash(self._items.hashes(one))[0])] = 0

    def _sweep(self) -> None:
        """Search the next lists for deleted items. An item that is deleted meanwhile is searched for from there on."""
        if not self._deleted:
            return
        for gone, start in list(self._deleted.items())[:_SWEPT_ROWS]:
            stop = min(start + _SWEPT_ROWS, self._used)
            found = self._rows.partner_UP[start:stop] == gone
            self._rows.partner_UP[start:stop][found] = 0
            self._rows.together_UP[start:stop][found] = 0
            if stop == self._used:
                del self._deleted[gone]
            else:
                self._deleted[gone] = stop

    def forget(self, user: int) -> None:
        """Remove a user (by the hash of `TakeColumns`): no pair is counted with their takes from here on.

        What was counted stays counted, of items and pairs of items, without who took them. A drawn exposure that names
        one of these takes leaves out the take and no pair.
        """
        self._users.forget(user)

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything, copied: after `restore` a state of the same configuration goes on with the same digits."""
        state = State(
            {f"rows.{name}": column[: self._used].copy() for name, column in vars(self._rows).items()},
            {"before": self.before, "version": self.config.version, "takes": self._shared.takes},
        )
        state.arrays.update(
            {
                "number": self._number_S[: self._used].copy(),
                "free": np.array(self._free, np.int64),
                "deleted": np.array(list(self._deleted.items()), np.int64).reshape(-1, 2),
                "shared.category": self._shared.category_C.copy(),
                "shared.word": self._shared.word_C.copy(),
            }
        )
        state.put("users", self._users.snapshot())
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if it is of other features."""
        arrays, values = state.arrays, state.values
        if values["version"] != self.config.version:
            raise ValueError(f"the state is of features {values['version']}, not of {self.config.version}")
        self.before = values["before"]
        self._rows = TakeRows(*(arrays[f"rows.{name}"].copy() for name in vars(self._rows)))
        self._number_S, self._used = arrays["number"].copy(), len(arrays["number"])
        self._free = arrays["free"].tolist()
        self._slot_I = np.zeros(max(64, int(self._number_S.max(initial=0)) + 1), np.int32)
        held = np.flatnonzero(self._number_S)
        self._slot_I[self._number_S[held]] = held
        self._deleted = dict(arrays["deleted"].tolist())
        self._shared = SharedCounts(arrays["shared.category"].copy(), arrays["shared.word"].copy(), values["takes"])
        self._users.restore(state.part("users"))


def _counted(count_C: NDArray[np.uint32], places: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A copy of the counts with these added."""
    return count_C + np.bincount(places, minlength=len(count_C)).astype(np.uint32)
