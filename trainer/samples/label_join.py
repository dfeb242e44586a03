"""Joins exposures with the user's takes and with their history as of the exposure: the training rows of CiUBM."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import chain

import numpy as np

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.samples.corrections import CorrectableRows
from trainer.samples.exposure_draws import Draws, ExposureDraws, nothing_ahead
from trainer.samples.histories import newest_only
from trainer.samples.id_hashes import id_hashes
from trainer.samples.numbering import ItemNumbers
from trainer.samples.rows import (
    NO_IMPRESSION,
    RELIABILITY,
    Impression,
    Take,
    pack_impressions,
    row_bytes,
    unpack_impressions,
)
from trainer.samples.searches import SearchUse, is_hidden, searched
from trainer.samples.user_history import UserHistory, packed_histories
from trainer.samples.window import Observed
from trainer.state import State, unragged
from trainer.tables import Slots


class ImpressionJoin:
    """Builds impressions second by second.

    All impressions of a second have the histories before that second; its takes are appended afterwards. An impression
    waits `attribution_seconds` of event time for a take that names it (or, unnamed, of the same user and item); then it
    is resolved, in the order of its second. A history holds each item once, at its newest take; those of earlier builds
    (`items_once` false) held every take.

    A take after that corrects an impression that is among `corrections`: the impression is returned a second time, as
    taken, or as taken in a more reliable way.
    """

    def __init__(
        self,
        catalogue: ItemNumbers,
        *,
        history_length: int,
        attribution_seconds: float,
        max_users: int,
        corrections: CorrectableRows | None = None,
        draws: Draws | None = None,
        items_once: bool = True,
        searches: SearchUse = SearchUse.RAW,
    ) -> None:
        self._catalogue = catalogue
        self._searches = searches
        self._length = history_length
        self._attribution = attribution_seconds
        self._max_users = max_users
        self._histories: OrderedDict[str, int] = OrderedDict()
        self._history_rows: Slots[UserHistory] = Slots()
        self._take_number = 0
        self._once = items_once
        self._waiting: deque[Impression] = deque()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}
        self._correctable = corrections
        self._draws = draws
        self._drawn_waiting = 0
        self.waiting_bytes = 0
        """About how much memory unresolved impressions take."""
        self._corrections: list[Impression] = []
        self.too_late = 0
        """Takes that name an exposure which is too old for them, or not known (any more)."""

    @property
    def waiting(self) -> int:
        """Number of exposures of the log that are not yet resolved."""
        return len(self._waiting) - self._drawn_waiting

    @property
    def unresolved(self) -> int:
        """Number of impressions that are not yet resolved, those that were drawn included."""
        return len(self._waiting)

    def add_second(
        self, events: list[Observed], ahead: Callable[[int, int], Iterable[list[Observed]]] = nothing_ahead
    ) -> list[Take]:
        """Add all events of one second (exposures first, as the window orders them); returns the takes.

        `ahead` is as in `ExposureDraws.move_to`.
        """
        takes: list[Take] = []
        if self._draws is not None:
            self._draws.move_to(events, ahead)
        drawn: list[Impression] = []
        if self._correctable is not None:
            self._correctable.forget_before(events[0].second)
        for event in events:
            if event.behaviour.kind is BehaviourKind.EXPOSURE:
                self._expose(event)
        for event in events:
            if event.behaviour.kind.is_take:
                takes.append(self._add_take(event, drawn))
        self._waiting.extend(drawn)
        self._drawn_waiting += len(drawn)
        self.waiting_bytes += sum(map(row_bytes, drawn))
        for take in takes:
            self._append(take)
        return takes

    def resolved(self, before: float) -> Iterator[Impression]:
        """Yield the impressions whose label is final once event time has reached `before`, oldest first."""
        while self._waiting and self._waiting[0].second + self._attribution < before:
            impression = self._waiting.popleft()
            self._unname(impression)
            self._drawn_waiting -= bool(impression.draw)
            self.waiting_bytes -= row_bytes(impression)
            if self._correctable is not None and impression.draw <= 1:  # what was drawn beside a take stays not taken
                self._correctable.add(impression)
            yield impression

    def items_in_use(self) -> Iterator[int]:
        """Numbers of the items that histories, rows and draws name; after `add_second` a matter of the log alone."""
        for place in self._histories.values():
            yield from self._history_rows[place].items
        for row in chain(self._waiting, self._correctable or ()):
            yield from filter(None, (row.item, row.query, *row.history))
        if isinstance(self._draws, ExposureDraws):
            yield from filter(None, map(self._catalogue.find, self._draws.items()))

    def corrections(self) -> list[Impression]:
        """Impressions corrected by late takes since the last call, in the order of the takes."""
        corrections, self._corrections = self._corrections, []
        return corrections

    def forget(self, user_id: str) -> list[Impression]:
        """Remove a user's history and unresolved impressions; returns the latter."""
        row = self._histories.pop(user_id, None)
        if row is not None:
            self._history_rows.pop(row)
        if self._correctable is not None:
            self._correctable.forget(user_id)
        if isinstance(self._draws, ExposureDraws):
            self._draws.forget(user_id)
        own = [impression for impression in self._waiting if impression.user_id == user_id]
        self._drawn_waiting -= sum(bool(impression.draw) for impression in own)
        self.waiting_bytes -= sum(map(row_bytes, own))
        if own:
            self._waiting = deque(impression for impression in self._waiting if impression.user_id != user_id)
        for impression in own:
            self._unname(impression)
        return own

    def snapshot(self) -> State:
        """Histories, each with the number of its newest take, and unresolved impressions, the oldest first."""
        state = State()
        state.put_table("", self._history_rows.table(packed_histories, user_column="users"))
        state.put("waiting", pack_impressions(self._waiting))
        state.values |= {"too_late": self.too_late, "next_take": self._take_number}
        if self._correctable is not None:
            state.put("correctable", self._correctable.snapshot())
        if isinstance(self._draws, ExposureDraws):
            state.put("draws", self._draws.snapshot())
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        users, items, seconds = state.texts("users"), unragged("items", state), unragged("seconds", state)
        used = state.arrays.get("used", np.arange(len(users))).tolist()  # an earlier build wrote them in their order
        histories = zip(users, map(tuple, items), map(tuple, seconds), used, strict=True)
        rows = [None if one[-1] < 0 else UserHistory(*one) for one in histories]
        self._history_rows = Slots(rows)
        # the newest number may be that of a user who was forgotten since
        self._take_number = state.values.get("next_take", max(used, default=-1) + 1)
        self._histories = OrderedDict((users[row], row) for row in np.argsort(used).tolist() if rows[row])
        for row in self._histories.values():
            history = self._history_rows[row]
            if self._once and len(set(history.items)) < len(history.items):  # of an earlier build
                self._history_rows[row] = history.only(newest_only(history.items))
        self._waiting = deque(unpack_impressions(state.part("waiting")))
        self.too_late = state.values.get("too_late", 0)
        if self._correctable is not None and "correctable" in state.values:
            self._correctable.restore(state.part("correctable"))
        if isinstance(self._draws, ExposureDraws) and "draws" in state.values:
            self._draws.restore(state.part("draws"))
        answerable = [impression for impression in self._waiting if impression.draw <= 1]
        self._drawn_waiting = sum(bool(impression.draw) for impression in self._waiting)
        self.waiting_bytes = sum(map(row_bytes, self._waiting))
        self._by_event = {impression.event_id: impression for impression in answerable}
        self._by_pair = {(impression.user_id, impression.item): impression for impression in answerable}

    def _unname(self, impression: Impression) -> None:
        # another user's event may carry the same id, in another partition
        if self._by_event.get(impression.event_id) is impression:
            del self._by_event[impression.event_id]
        pair = (impression.user_id, impression.item)
        if self._by_pair.get(pair) is impression:
            del self._by_pair[pair]

    def _history_of(self, user_id: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        row = self._histories.get(user_id)
        return ((), ()) if row is None else self._history_rows[row][1:3]

    def _expose(self, event: Observed) -> None:
        behaviour = event.behaviour
        item = self._catalogue.number(behaviour.item_id)
        items, seconds = self._history_of(behaviour.user_id)
        retaken = item in items
        if behaviour.trigger_item is not None:
            items = (*items, self._catalogue.number(behaviour.trigger_item))[-self._length :]
            seconds = (*seconds, event.second)[-self._length :]
        impression = self._impression(event, item, items, seconds, retaken=retaken)
        self._waiting.append(impression)
        self.waiting_bytes += row_bytes(impression)
        self._name(impression)

    def _impression(
        self, event: Observed, item: int, items: tuple[int, ...], seconds: tuple[int, ...], *, retaken: bool
    ) -> Impression:
        behaviour = event.behaviour
        numbered, raw = self._searches is SearchUse.NUMBERED, self._searches is SearchUse.RAW
        seen = numbered and not is_hidden(behaviour.user_id, event.second)
        query = searched(behaviour.query_text, behaviour.query_image) if seen else None
        return Impression(
            event_id=behaviour.event_id,
            partition=event.partition,
            offset=event.offset,
            second=event.second,
            user_id=behaviour.user_id,
            item=item,
            history=items,
            history_seconds=seconds,
            retaken=retaken,
            defines_publish=behaviour.defines_publish,
            query_text=behaviour.query_text if raw or query is not None else None,
            query_image=behaviour.query_image if raw else None,
            query=0 if query is None else self._catalogue.number(query),
            drawn_from=_event_hash(behaviour.drawn_from or ""),
            drawn_second=0 if behaviour.drawn_at is None else math.floor(behaviour.drawn_at.timestamp()),
        )

    def share_moments(self, ready: Iterable[Impression]) -> None:
        """Let ready impressions share features with those that a late take can correct, as before a restart."""
        if self._correctable is None:
            return
        moments = {(row.user_id, row.shown_as): row.moment for row in ready if not row.correction}
        for row in (*self._correctable, *ready):
            row.moment = moments.setdefault((row.user_id, row.shown_as), row.moment)

    def note_features(self, rows: Iterable[Impression]) -> None:
        """Note that these rows have their features now, for snapshots of what can be corrected."""
        if self._correctable is not None:
            for row in rows:
                self._correctable.note_features(row)

    def _name(self, impression: Impression) -> None:
        self._by_event[impression.event_id] = impression
        self._by_pair[impression.user_id, impression.item] = impression

    def _draw(self, draws: Draws, event: Observed, item: int) -> list[Impression]:
        """The exposure of a take that answers none, and those drawn beside it."""
        items, seconds = self._history_of(event.behaviour.user_id)
        own = self._impression(event, item, items, seconds, retaken=item in items)
        own.draw, own.label, own.taken_as, own.value = 1, 1, event.behaviour.kind, event.behaviour.value
        self._name(own)
        beside = []
        for number, source in enumerate(draws.draw(event, fits=self._is_named), 2):
            other = self._catalogue.number(source.item_id)
            drawn = self._impression(event, other, items, seconds, retaken=other in items)
            drawn.event_id, drawn.draw = f"{own.event_id}~{number}", number
            drawn.drawn_from, drawn.drawn_second = _event_hash(source.event_id), source.second
            beside.append(drawn)
        # the order inside a second must not tell which was taken
        place = int.from_bytes(blake2b(own.event_id.encode(), digest_size=8).digest(), "little") % (len(beside) + 1)
        return [*beside[:place], own, *beside[place:]]

    def _is_named(self, item_id: str) -> bool:
        return self._catalogue.find(item_id) is not None  # an item that the log has not named is not there yet

    def _add_take(self, event: Observed, drawn: list[Impression]) -> Take:
        behaviour = event.behaviour
        item = self._catalogue.number(behaviour.item_id)
        impression = self._answered(behaviour, item)
        if impression is not None:
            impression.label = 1
            if impression.taken_as is None or RELIABILITY[behaviour.kind] > RELIABILITY[impression.taken_as]:
                impression.taken_as, impression.value = behaviour.kind, behaviour.value
            return self._take(event, item, impression)
        known = self._correctable is not None and self._correct(self._correctable, event, item)
        if not known and self._draws is not None and behaviour.exposure_id is None:
            drawn.extend(self._draw(self._draws, event, item))
        return self._take(event, item)

    def _take(self, event: Observed, item: int, shown: Impression = NO_IMPRESSION) -> Take:
        """A take that says no search or trigger of its own has those of its exposure."""
        behaviour = event.behaviour
        query, trigger = shown.query, 0
        if self._searches is SearchUse.NUMBERED:
            own = searched(behaviour.query_text, behaviour.query_image)
            query = query if own is None else self._catalogue.number(own)
            if behaviour.trigger_item is not None:
                trigger = self._catalogue.number(behaviour.trigger_item)
            elif shown.history_seconds and shown.history_seconds[-1] == shown.second:  # takes are of earlier seconds
                trigger = shown.history[-1]
        return Take(
            event.second,
            behaviour.user_id,
            item,
            _event_hash(behaviour.event_id),
            announces=behaviour.defines_publish,
            query=query,
            trigger=trigger,
        )

    def _correct(self, correctable: CorrectableRows, event: Observed, item: int) -> bool:
        """Whether the take has an impression that is not too old for it, whether it changes it or not."""
        behaviour = event.behaviour
        known = correctable.find(behaviour, item)
        late = correctable.pop_corrected(behaviour, item, event.second)
        if late is None:
            if known is None:
                self.too_late += behaviour.exposure_id is not None  # without a name it may have had no exposure
            else:
                late_by_kind = correctable.is_late(known, behaviour.kind, event.second)
                self.too_late += late_by_kind
                return not late_by_kind
            return False
        corrected = replace(
            late,
            event_id=behaviour.event_id,
            partition=event.partition,
            offset=event.offset,
            draw=0,
            label=1,
            taken_as=behaviour.kind,
            value=behaviour.value,
            correction=True,
            taken_before=late.taken_as if late.label else None,
            exposure_id=late.shown_as,
        )
        self._corrections.append(corrected)
        correctable.add(corrected)
        return True

    def _answered(self, behaviour: Behaviour, item: int) -> Impression | None:
        if behaviour.exposure_id is not None:
            named = self._by_event.get(behaviour.exposure_id)
            # a take counts only for an exposure of the same user and item, whatever it names
            return named if named and (named.user_id, named.item) == (behaviour.user_id, item) else None
        return self._by_pair.get((behaviour.user_id, item))

    def _append(self, take: Take) -> None:
        user, number = take.user_id, self._take_number
        self._take_number += 1
        row = self._histories.get(user)
        if row is None:
            self._histories[user] = self._history_rows.add(UserHistory(user, (take.item,), (take.second,), number))
            if len(self._histories) > self._max_users:
                self._history_rows.pop(self._histories.popitem(last=False)[1])  # the user inactive for longest
            return
        self._histories.move_to_end(user)
        history = self._history_rows[row]
        self._history_rows[row] = history.with_take(take, number, length=self._length, once=self._once)


def _event_hash(event_id: str) -> int:
    return id_hashes(event_id)[0] if event_id else 0
