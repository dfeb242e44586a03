"""The state behind the features of the moment: what the takes so far left behind, by item and by user.

A row sees the state as of the step before: its features are computed first, then the takes before the second of the
step's newest row are added. A take of that very second waits for the next step, so no row sees its own take.

Letters: T takes of a step, S slots of items that were taken (slot 0 belongs to none), U distinct items.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.changed_rows import ChangedRows
from trainer.features.config import HALF_LIVES, FeatureConfig
from trainer.features.held_state import HeldState
from trainer.features.item_slots import ItemSlots, short_of
from trainer.features.partners import count_pairs
from trainer.features.states import (
    CATEGORY_SLOTS,
    NEVER,
    WORD_SLOTS,
    DrawnSources,
    ItemStates,
    SharedCounts,
    TakeRows,
    distinct,
    item_hash,
    trigger_hashes,
)
from trainer.features.take_columns import TakeColumns
from trainer.features.user_takes import UserTakes
from trainer.samples.id_hashes import id_hashes
from trainer.samples.item_facts import FactRows
from trainer.state import State, Table, copied_rows

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


class FeatureState:
    """Bounded state of all items and users; every verb is a function of what was added before, in steps."""

    def __init__(self, config: FeatureConfig, items: FeatureItems) -> None:
        self.config = config
        self.before = NEVER
        """Takes of earlier seconds are counted."""
        self._items = items
        self._users = UserTakes(config)
        self._shared = SharedCounts.empty()
        self._slots = ItemSlots(np.zeros(64, np.int64))
        """By hashes of items' ids: numbers of items come and go."""
        self._rows = TakeRows.empty(config, 64)
        self._changed = ChangedRows()
        self._used = 1
        self._free: list[int] = []  # a heap: the lowest is taken first, so that snapshots need not say which
        self._deleted: set[int] = set()
        """Hashes of deleted items that the next pass over the lists searches for."""
        self._searched_D = np.zeros(0, np.uint32)
        """Those that this pass searches for."""
        self._swept = 0
        """Slot that this pass comes to next."""
        self._held: HeldState | None = None
        self.changed_keys: set[int] | None = None
        """Keys of the items that changed since their reader emptied it; None while nobody reads them."""

    # ---- reading -------------------------------------------------------------------------------------------------

    def states(self, numbers_U: NDArray[np.int64]) -> ItemStates:
        """What features read of these items, as copies; a number of 0 gives padding."""
        hashes_U2 = self._items.hashes(numbers_U)
        takes = self._rows.rows(self._slots.of(hashes_U2[:, 0]))
        triggered = None
        if self.config.queries:
            triggered = self._rows.rows(self._slots.of(trigger_hashes(hashes_U2)[:, 0]))
        facts = self._items.facts(numbers_U)
        return ItemStates(item_hash(hashes_U2), facts, takes, self._shared, self.before, triggered)

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
        short_D = item_hash(self._items.hashes(target_B[drawn]))
        beside_DL = self._users.beside(row_D, short_D, second_B[drawn])
        if self.config.queries:
            beside_DL = np.column_stack([beside_DL, self._users.led_to(source_B[drawn].tolist())])
        partner_BL = np.zeros((len(target_B), beside_DL.shape[1]), np.uint32)
        partner_BL[drawn] = beside_DL
        return DrawnSources(seconds_B, partner_BL)

    @property
    def keys(self) -> Collection[int]:
        """The items that have counts, by the first hash of their ids."""
        return self._slots.by_key.keys()

    @property
    def shared(self) -> SharedCounts:
        """Takes of all items together; never written to again."""
        return self._shared

    def record(self, key: int) -> bytes | None:
        """What the takes of one item left behind, as `TakeRows.to_bytes`; None for one without counts."""
        slot = self._slots.by_key.get(key)
        return None if slot is None else self._rows.to_bytes(slot)

    def hold(self) -> None:
        """Keep the state as it is now for `held_states`, in place of one that was kept before."""
        self._held = HeldState(self.before, self._shared)

    @property
    def held_before(self) -> int | None:
        """`before` of the state that is kept; None if none is."""
        return None if self._held is None else self._held.before

    def held_states(self, hashes_U2: NDArray[np.int64], facts: FactRows) -> ItemStates:
        """What features read of the items with these hashes, and facts, from the state that is kept."""
        assert self._held is not None, "no state is kept"
        held, by_key = self._held, self._slots.by_key
        rows, triggered = held.rows(hashes_U2[:, 0].tolist(), by_key, self._rows), None
        if self.config.queries:
            triggered = held.rows(trigger_hashes(hashes_U2)[:, 0].tolist(), by_key, self._rows)
        return ItemStates(item_hash(hashes_U2), facts, rows, held.shared, held.before, triggered)

    def _keep(self, slots: NDArray[np.int64]) -> None:
        """Called before rows change."""
        if self._held is not None:
            self._held.keep(slots, self._slots.key_S, self._rows)

    # ---- counting ------------------------------------------------------------------------------------------------

    def add(self, takes: TakeColumns, *, before: int) -> NDArray[np.int64]:
        """Count the takes of one step, all of seconds before `before`; returns the keys of the items that changed.

        A key is the first of an id's two hashes. The order in which they are given does not matter.
        """
        self.before = max(self.before, before)
        self._sweep()
        takes = takes.select(np.lexsort((takes.event_T, takes.user_T, takes.second_T)))
        starts = range(0, len(takes), _TAKES_AT_ONCE)
        changed = [self._add(takes.select(slice(start, start + _TAKES_AT_ONCE))) for start in starts]
        return distinct(np.concatenate([np.zeros(0, np.int64), *changed]))

    def _add(self, takes: TakeColumns) -> NDArray[np.int64]:
        counted = takes.select(~takes.announces_T)
        changed = np.zeros(0, np.int64)
        if len(counted):
            hashes_T2 = self._items.hashes(counted.item_T)
            short_T = item_hash(hashes_T2)
            led_A, led_A2 = self._led_to(counted)
            take, other = self._users.add(counted.user_T, short_T, counted.second_T)
            self._count_shared(counted.item_T)
            key_N = np.concatenate([hashes_T2[:, 0], led_A2[:, 0]])
            self._admit(key_N, np.concatenate([short_T, item_hash(led_A2)]))
            slot_N = self._slots.of(key_N)
            slot_T, slot_A = slot_N[: len(counted)], slot_N[len(counted) :]
            self._keep(slot_N)
            self._count_takes(slot_T, counted.second_T)
            if len(led_A):  # a search or a trigger is counted as an item is, with what was taken after it
                self._count_takes(slot_A, counted.second_T[led_A])
                count_pairs(self._rows, slot_A, short_T[led_A])
            slots = distinct(np.concatenate([self._count_together(short_T, take, other), slot_N]))
            self._touch(slots)
            changed = self._slots.key_S[slots]
        queries, triggers = (item_hash(hashes_T2) for hashes_T2 in self._searches_and_triggers(takes))
        self._users.remember(takes.event_T, takes.user_T, ~takes.announces_T, queries, triggers)
        return changed

    def _led_to(self, takes: TakeColumns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What led to takes, searches first: places of the takes, and the hashes of a search or trigger each."""
        both = self._searches_and_triggers(takes)
        places = [np.flatnonzero(hashes_T2[:, 0]) for hashes_T2 in both]
        return np.concatenate(places), np.concatenate([one_T2[at] for one_T2, at in zip(both, places, strict=True)])

    def _searches_and_triggers(self, takes: TakeColumns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hashes of the takes' searches and triggers, shape (T, 2) each, zeros for none."""
        none_T = np.zeros(len(takes), np.int64)
        query_T = none_T if takes.query_T is None else takes.query_T
        trigger_T = none_T if takes.trigger_T is None else takes.trigger_T
        return self._items.hashes(query_T), trigger_hashes(self._items.hashes(trigger_T))

    def _count_shared(self, item_T: NDArray[np.int64]) -> None:
        facts = self._items.facts(item_T)
        words = facts.words_IW[facts.words_IW > 0]
        self._shared = replace(
            self._shared,
            category_C=_counted(self._shared.category_C, facts.category_I % CATEGORY_SLOTS),
            word_C=_counted(self._shared.word_C, words % WORD_SLOTS),
            takes=self._shared.takes + len(item_T),
        )

    def _count_takes(self, slot_T: NDArray[np.int64], second_T: NDArray[np.int64]) -> None:
        """Takes in order of time, so that sums do not depend on how they came."""
        order = np.argsort(slot_T, kind="stable")
        slot_T, second_T = slot_T[order], second_T[order]
        slot_S, first_S, number_T = np.unique(slot_T, return_index=True, return_inverse=True)
        count_S = np.diff(np.append(first_S, len(slot_T)))
        end_S = first_S + count_S - 1
        rows = self._rows
        old_last_S, old_previous_S = rows.last_U[slot_S], rows.previous_U[slot_S]
        last_S = np.maximum(old_last_S, second_T[end_S])
        half_life_H1 = np.array([*HALF_LIVES.values()])[:, None]
        idle_S = last_S - np.where(old_last_S > NEVER, old_last_S, last_S)
        left_HS = rows.decayed_UH[slot_S].T.astype(np.float64) * np.exp2(-idle_S / half_life_H1)
        weight_HT = np.exp2(-(last_S[number_T] - second_T) / half_life_H1)
        rows.decayed_UH[slot_S] = (left_HS + np.add.reduceat(weight_HT, first_S, axis=1)).T
        newest_S2 = np.stack([second_T[end_S], np.where(count_S > 1, second_T[np.maximum(end_S - 1, 0)], NEVER)], 1)
        four_S4 = np.sort(np.concatenate([newest_S2, old_last_S[:, None], old_previous_S[:, None]], axis=1), axis=1)
        rows.last_U[slot_S], rows.previous_U[slot_S] = four_S4[:, 3], four_S4[:, 2]
        rows.takes_U[slot_S] += count_S.astype(np.uint32)

    def _count_together(
        self, short_T: NDArray[np.uint32], take_K: NDArray[np.int64], other_K: NDArray[np.uint32]
    ) -> NDArray[np.int64]:
        """Both sides of each pair, once where an item meets itself; returns the slots that changed."""
        one_K = short_T[take_K]
        apart = one_K != other_K
        slot_T, slot_K = self._slots.of_shorts(short_T), self._slots.of_shorts(other_K[apart])
        slot = np.concatenate([slot_T[take_K], slot_K])
        partner = np.concatenate([other_K, one_K[apart]])
        kept = slot > 0  # an item that lost its counts since has no list
        slot, partner = slot[kept], partner[kept]
        self._keep(slot)
        return count_pairs(self._rows, slot, partner)

    # ---- admission, eviction, deletion ---------------------------------------------------------------------------

    def _admit(self, key_T: NDArray[np.int64], short_T: NDArray[np.uint32]) -> None:
        """Give slots to items taken for the first time; where none is left, take those of the longest untaken."""
        keys, first = np.unique(key_T, return_index=True)
        new = np.flatnonzero(self._slots.of(keys) == 0)
        short = len(self._slots) + len(new) - self.config.max_items
        if short > 0:
            self._evict(max(short, self.config.max_items // _EVICTED_SHARE), kept=keys)
        for key, name in zip(keys[new].tolist(), short_T[first[new]].tolist(), strict=True):
            slot = heapq.heappop(self._free) if self._free else self._new_slot()
            self._keep(np.array([slot]))
            self._slots.put(key, name, slot)

    def _new_slot(self) -> int:
        if self._used == len(self._rows):
            size, more = self._used, max(self._used + 1, min(2 * self._used, self.config.max_items + 1))
            rows = TakeRows.empty(self.config, more)
            for name, column in vars(self._rows).items():
                getattr(rows, name)[:size] = column
            self._rows = rows
            self._slots.grow(more)
        self._used += 1
        return self._used - 1

    def _evict(self, most: int, *, kept: NDArray[np.int64]) -> None:
        held = np.flatnonzero(self._slots.key_S)
        held = held[~np.isin(self._slots.key_S[held], kept)]
        self._empty(held[np.lexsort((self._slots.key_S[held], self._rows.last_U[held]))][:most])

    def _empty(self, slots: NDArray[np.int64]) -> None:
        self._keep(slots)
        self._touch(slots)
        self._slots.free(slots)
        self._rows.clear(slots)
        for slot in slots.tolist():
            heapq.heappush(self._free, slot)

    def delete(self, item_id: str) -> None:
        """Remove a deleted item's counts; lists of partners lose it in the steps that follow, some lists in each."""
        key = id_hashes(item_id)[0]
        as_trigger = int(trigger_hashes(np.array([[key, 0]]))[0, 0])
        if slots := [self._slots.by_key[one] for one in (key, as_trigger) if one in self._slots.by_key]:
            self._empty(np.array(slots))
        self._users.delete(short_of(key))
        self._deleted.add(short_of(key))

    def _touch(self, slots: NDArray[np.int64]) -> None:
        self._changed.touch(slots)
        if self.changed_keys is not None:
            self.changed_keys.update(self._slots.key_S[slots].tolist())
            self.changed_keys.discard(0)

    def _sweep(self) -> None:
        """Search the next lists for all deleted items at once; one deleted meanwhile waits for the next pass."""
        if not len(self._searched_D):
            if not self._deleted:
                return
            self._searched_D, self._swept = np.array(sorted(self._deleted), np.uint32), 0
            self._deleted.clear()
        stop = min(self._swept + _SWEPT_ROWS, self._used)
        partner, together = (
            column[self._swept : stop].reshape(-1) for column in (self._rows.partner_UP, self._rows.together_UP)
        )
        short = np.zeros(1 << 16, bool)
        short[self._searched_D.astype(np.uint16)] = True
        found = np.flatnonzero(short.take(partner.astype(np.uint16)))
        found = found[np.isin(partner[found], self._searched_D)]
        slots = self._swept + distinct(found // self.config.partners)
        self._keep(slots)
        partner[found], together[found] = 0, 0
        self._touch(slots)
        self._swept = stop
        if stop == self._used:
            self._searched_D = self._searched_D[:0]

    def forget(self, user: int) -> None:
        """Remove a user (by the hash of `TakeColumns`): no pair is counted with their takes from here on.

        What was counted stays counted, of items and pairs of items, without who took them. A drawn exposure that names
        one of these takes leaves out the take and no pair.
        """
        self._users.forget(user)

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything: after `restore` a state of the same configuration goes on with the same digits."""
        values: dict[str, Any] = {"before": self.before, "version": self.config.version, "takes": self._shared.takes}
        values |= {"deleted": sorted(self._deleted), "swept": self._swept}
        state = State({}, values)
        state.arrays.update(
            {
                "searched": self._searched_D,
                "shared.category": self._shared.category_C.copy(),
                "shared.word": self._shared.word_C.copy(),
            }
        )
        state.put_table("rows.", Table(self._used, self._changed, self._copied))
        state.put("users", self._users.snapshot())
        return state

    def _copied(self, slots: NDArray[np.int64]) -> Callable[[slice], State]:
        return copied_rows({**vars(self._rows), "key": self._slots.key_S}, slots)

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if it is of other features."""
        arrays, values = state.arrays, state.values
        if values["version"] != self.config.version:
            raise ValueError(f"the state is of features {values['version']}, not of {self.config.version}")
        self.before = values["before"]
        self._rows = TakeRows(*(arrays[f"rows.{name}"].copy() for name in vars(self._rows)))
        self._slots, self._used = ItemSlots(arrays["rows.key"].copy()), len(arrays["rows.key"])
        self._changed = ChangedRows()
        self._free = (np.flatnonzero(self._slots.key_S[1:] == 0) + 1).tolist()
        self._deleted, self._swept = set(values["deleted"]), values["swept"]
        self._searched_D = arrays["searched"].copy()
        self._shared = SharedCounts(arrays["shared.category"].copy(), arrays["shared.word"].copy(), values["takes"])
        self._users.restore(state.part("users"))


def _counted(count_C: NDArray[np.uint32], places: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A copy of the counts with these added."""
    count_C = count_C.copy()
    np.add.at(count_C, places, np.uint32(1))
    return count_C
