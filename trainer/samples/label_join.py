"""Joins exposures with what the user took and with his history as of that moment: the rows CiUBM learns from."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.samples.numbering import ItemNumbers
from trainer.samples.window import Observed
from trainer.state import State, ragged, unragged, whole_numbers

_RELIABILITY = {kind: rank for rank, kind in enumerate(BehaviourKind)}


@dataclass(slots=True)
class Impression:
    """One exposure, with everything that was known at its second and, once resolved, its label."""

    event_id: str
    partition: int
    offset: int
    second: int
    user_id: str
    item: int
    """Number of the item in the catalogue."""
    history: tuple[int, ...]
    """Numbers of the items that the user took before this second, oldest first; a trigger item stands last."""
    history_seconds: tuple[int, ...]
    """When he took them."""
    retaken: bool
    """Whether the user had already taken this very item."""
    defines_publish: bool
    label: int = 0
    taken_as: BehaviourKind | None = None
    """The most reliable kind of take that answered it so far."""
    query_text: str | None = None
    query_image: bytes | None = None
    """The search that led here, where there was one."""
    correction: bool = False
    """Whether this is the same impression once more, as taken, after it was resolved as not taken; id and place are
    then those of the late take."""


@dataclass(slots=True)
class _UserHistory:
    items: list[int] = field(default_factory=list)
    seconds: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Take:
    """A take, as the samplers of negatives see it."""

    second: int
    user_id: str
    item: int


class ImpressionJoin:
    """Builds impressions second by second.

    All impressions of a second see the histories as they were before that second; only then do its takes count. An
    impression waits `attribution_seconds` of event time for a take that names it (or, unnamed, of the same user and
    item); then it is resolved, in the order of its second.

    A take that comes later, but within `correction_seconds` more, corrects what was resolved as not taken: the
    impression comes a second time, as taken. The newest `correction_rows` of those not taken are remembered for that.
    """

    def __init__(
        self,
        catalogue: ItemNumbers,
        *,
        history_length: int,
        attribution_seconds: float,
        max_users: int,
        correction_seconds: float = 0.0,
        correction_rows: int = 0,
    ) -> None:
        self._catalogue = catalogue
        self._length = history_length
        self._attribution = attribution_seconds
        self._max_users = max_users
        self._histories: OrderedDict[str, _UserHistory] = OrderedDict()
        self._waiting: deque[Impression] = deque()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}
        self._correctable = _Correctable(attribution_seconds + correction_seconds, correction_rows)
        self._corrections: list[Impression] = []

    @property
    def waiting(self) -> int:
        """Impressions that are not yet resolved."""
        return len(self._waiting)

    def waiting_impressions(self) -> Iterator[Impression]:
        """The impressions that are not yet resolved, oldest first."""
        return iter(self._waiting)

    def add_second(self, events: list[Observed]) -> list[Take]:
        """Take in all events of one second (exposures first, as the window orders them); returns the takes."""
        takes: list[Take] = []
        self._correctable.forget_before(events[0].second)
        for event in events:
            if event.behaviour.kind is BehaviourKind.EXPOSURE:
                self._expose(event)
        for event in events:
            if event.behaviour.kind.is_take:
                takes.append(self._take(event))
        for take in takes:
            self._append(take)
        return takes

    def resolved(self, before: float) -> Iterator[Impression]:
        """Give out the impressions whose label is settled once event time has reached `before`, oldest first."""
        while self._waiting and self._waiting[0].second + self._attribution < before:
            impression = self._waiting.popleft()
            self._unname(impression)
            if not impression.label:
                self._correctable.add(impression)
            yield impression

    def corrections(self) -> list[Impression]:
        """Impressions that late takes answered since the last call, in the order of the takes."""
        corrections, self._corrections = self._corrections, []
        return corrections

    def forget(self, user_id: str) -> list[Impression]:
        """Take out a user's history and the impressions that wait; returns the latter."""
        self._histories.pop(user_id, None)
        self._correctable.forget(user_id)
        own = [impression for impression in self._waiting if impression.user_id == user_id]
        if own:
            self._waiting = deque(impression for impression in self._waiting if impression.user_id != user_id)
        for impression in own:
            self._unname(impression)
        return own

    def snapshot(self) -> State:
        """Histories, the longest still first, and waiting impressions, the oldest first."""
        state = State(values={})
        state.put_texts("users", self._histories)
        state.arrays.update(ragged("items", (history.items for history in self._histories.values())).arrays)
        state.arrays.update(ragged("seconds", (history.seconds for history in self._histories.values())).arrays)
        state.put("waiting", pack_impressions(self._waiting))
        state.put("correctable", self._correctable.snapshot())
        return state

    def restore(self, state: State) -> None:
        """Stand where `snapshot` was taken."""
        histories = zip(state.texts("users"), unragged("items", state), unragged("seconds", state), strict=True)
        self._histories = OrderedDict((user, _UserHistory(items, seconds)) for user, items, seconds in histories)
        self._waiting = deque(unpack_impressions(state.part("waiting")))
        self._correctable.restore(state.part("correctable"))
        self._by_event = {impression.event_id: impression for impression in self._waiting}
        self._by_pair = {(impression.user_id, impression.item): impression for impression in self._waiting}

    def _unname(self, impression: Impression) -> None:
        # another user's event may carry the same id, in another partition
        if self._by_event.get(impression.event_id) is impression:
            del self._by_event[impression.event_id]
        pair = (impression.user_id, impression.item)
        if self._by_pair.get(pair) is impression:
            del self._by_pair[pair]

    def taken_by(self, user_id: str) -> frozenset[int]:
        """Items in the user's history now."""
        history = self._histories.get(user_id)
        return frozenset(history.items) if history else frozenset()

    def _expose(self, event: Observed) -> None:
        behaviour = event.behaviour
        item = self._catalogue.number(behaviour.item_id)
        history = self._histories.get(behaviour.user_id)
        items: tuple[int, ...] = tuple(history.items) if history else ()
        seconds: tuple[int, ...] = tuple(history.seconds) if history else ()
        retaken = item in items
        if behaviour.trigger_item is not None:
            items = (*items, self._catalogue.number(behaviour.trigger_item))[-self._length :]
            seconds = (*seconds, event.second)[-self._length :]
        impression = Impression(
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
            query_text=behaviour.query_text,
            query_image=behaviour.query_image,
        )
        self._waiting.append(impression)
        self._by_event[impression.event_id] = impression
        self._by_pair[(impression.user_id, item)] = impression

    def _take(self, event: Observed) -> Take:
        behaviour = event.behaviour
        item = self._catalogue.number(behaviour.item_id)
        impression = self._answered(behaviour, item)
        if impression is not None:
            impression.label = 1
            if impression.taken_as is None or _RELIABILITY[behaviour.kind] > _RELIABILITY[impression.taken_as]:
                impression.taken_as = behaviour.kind
        elif (late := self._correctable.take(behaviour, item)) is not None:
            self._corrections.append(
                replace(
                    late,
                    event_id=behaviour.event_id,
                    partition=event.partition,
                    offset=event.offset,
                    label=1,
                    taken_as=behaviour.kind,
                    correction=True,
                )
            )
        return Take(event.second, behaviour.user_id, item)

    def _answered(self, behaviour: Behaviour, item: int) -> Impression | None:
        if behaviour.exposure_id is not None:
            named = self._by_event.get(behaviour.exposure_id)
            # a take may only answer its own user's exposure of that item, whatever it names
            return named if named and (named.user_id, named.item) == (behaviour.user_id, item) else None
        return self._by_pair.get((behaviour.user_id, item))

    def _append(self, take: Take) -> None:
        history = self._histories.get(take.user_id)
        if history is None:
            history = self._histories[take.user_id] = _UserHistory()
            if len(self._histories) > self._max_users:
                self._histories.popitem(last=False)  # the user who has been still for longest
        else:
            self._histories.move_to_end(take.user_id)
        history.items.append(take.item)
        history.seconds.append(take.second)
        if len(history.items) > self._length:
            del history.items[0], history.seconds[0]


class _Correctable:
    """The newest impressions that were resolved as not taken, oldest first, as long as a late take may correct them."""

    def __init__(self, seconds: float, rows: int) -> None:
        self._seconds = seconds
        self._rows = rows
        self._order: OrderedDict[tuple[int, int], Impression] = OrderedDict()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}

    def __iter__(self) -> Iterator[Impression]:
        return iter(self._order.values())

    def add(self, impression: Impression) -> None:
        if not self._rows:
            return
        self._order[impression.partition, impression.offset] = impression
        self._by_event[impression.event_id] = impression
        self._by_pair[impression.user_id, impression.item] = impression
        while len(self._order) > self._rows:
            self._drop(next(iter(self._order.values())))

    def take(self, behaviour: Behaviour, item: int) -> Impression | None:
        """The impression that this take answers; each is given out once."""
        if behaviour.exposure_id is not None:
            found = self._by_event.get(behaviour.exposure_id)
        else:
            found = self._by_pair.get((behaviour.user_id, item))
        if found is None or (found.user_id, found.item) != (behaviour.user_id, item):
            return None
        self._drop(found)
        return found

    def forget_before(self, second: int) -> None:
        while self._order and (oldest := next(iter(self._order.values()))).second + self._seconds < second:
            self._drop(oldest)

    def forget(self, user_id: str) -> None:
        for impression in [row for row in self if row.user_id == user_id]:
            self._drop(impression)

    def snapshot(self) -> State:
        state = pack_impressions(self)
        state.arrays["named"] = np.array([self._by_event.get(row.event_id) is row for row in self], bool)
        state.arrays["paired"] = np.array([self._by_pair.get((row.user_id, row.item)) is row for row in self], bool)
        return state

    def restore(self, state: State) -> None:
        rows = unpack_impressions(state)
        self._order = OrderedDict(((row.partition, row.offset), row) for row in rows)
        marked = zip(rows, state.arrays["named"].tolist(), state.arrays["paired"].tolist(), strict=True)
        self._by_event, self._by_pair = {}, {}
        for row, named, paired in marked:
            if named:
                self._by_event[row.event_id] = row
            if paired:
                self._by_pair[row.user_id, row.item] = row

    def _drop(self, impression: Impression) -> None:
        del self._order[impression.partition, impression.offset]
        if self._by_event.get(impression.event_id) is impression:
            del self._by_event[impression.event_id]
        pair = (impression.user_id, impression.item)
        if self._by_pair.get(pair) is impression:
            del self._by_pair[pair]


_KINDS = list(BehaviourKind)


def pack_impressions(impressions: Iterable[Impression]) -> State:
    """Impressions as arrays."""
    rows = list(impressions)
    state = State(values={})
    for name in ("partition", "offset", "second", "item", "label"):
        state.arrays[name] = whole_numbers(getattr(row, name) for row in rows)
    state.arrays["taken_as"] = whole_numbers(-1 if row.taken_as is None else _RELIABILITY[row.taken_as] for row in rows)
    for name in ("retaken", "defines_publish", "correction"):
        state.arrays[name] = np.array([getattr(row, name) for row in rows], bool)
    state.arrays.update(ragged("history", (row.history for row in rows)).arrays)
    state.arrays.update(ragged("history_seconds", (row.history_seconds for row in rows)).arrays)
    state.put_texts("event_id", (row.event_id for row in rows))
    state.put_texts("user_id", (row.user_id for row in rows))
    state.put_optional_texts("query_text", (row.query_text for row in rows))
    state.arrays["has_image"] = np.array([row.query_image is not None for row in rows], bool)
    state.put_bytes("query_image", (row.query_image or b"" for row in rows))
    return state


def unpack_impressions(state: State) -> list[Impression]:
    """What `pack_impressions` was given."""
    arrays = state.arrays
    histories, seconds = unragged("history", state), unragged("history_seconds", state)
    texts, images = state.optional_texts("query_text"), state.pieces("query_image")
    events, users = state.texts("event_id"), state.texts("user_id")
    return [
        Impression(
            event_id=events[i],
            partition=int(arrays["partition"][i]),
            offset=int(arrays["offset"][i]),
            second=int(arrays["second"][i]),
            user_id=users[i],
            item=int(arrays["item"][i]),
            history=tuple(histories[i]),
            history_seconds=tuple(seconds[i]),
            retaken=bool(arrays["retaken"][i]),
            defines_publish=bool(arrays["defines_publish"][i]),
            label=int(arrays["label"][i]),
            taken_as=None if arrays["taken_as"][i] < 0 else _KINDS[arrays["taken_as"][i]],
            query_text=texts[i],
            query_image=images[i] if arrays["has_image"][i] else None,
            correction=bool(arrays["correction"][i]),
        )
        for i in range(len(events))
    ]
