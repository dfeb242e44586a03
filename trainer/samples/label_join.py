"""Joins exposures with the user's takes and with their history as of the exposure: the training rows of CiUBM."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.samples.corrections import CorrectableRows
from trainer.samples.numbering import ItemNumbers
from trainer.samples.rows import RELIABILITY, Impression, Take, pack_impressions, unpack_impressions
from trainer.samples.window import Observed
from trainer.state import State, ragged, unragged


@dataclass(slots=True)
class _UserHistory:
    items: list[int] = field(default_factory=list)
    seconds: list[int] = field(default_factory=list)


class ImpressionJoin:
    """Builds impressions second by second.

    All impressions of a second have the histories before that second; its takes are appended afterwards. An impression
    waits `attribution_seconds` of event time for a take that names it (or, unnamed, of the same user and item); then it
    is resolved, in the order of its second.

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
    ) -> None:
        self._catalogue = catalogue
        self._length = history_length
        self._attribution = attribution_seconds
        self._max_users = max_users
        self._histories: OrderedDict[str, _UserHistory] = OrderedDict()
        self._waiting: deque[Impression] = deque()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}
        self._correctable = corrections
        self._corrections: list[Impression] = []
        self.too_late = 0
        """Takes that name an exposure which is too old for them, or not known (any more)."""

    @property
    def waiting(self) -> int:
        """Number of impressions that are not yet resolved."""
        return len(self._waiting)

    def add_second(self, events: list[Observed]) -> list[Take]:
        """Add all events of one second (exposures first, as the window orders them); returns the takes."""
        takes: list[Take] = []
        if self._correctable is not None:
            self._correctable.forget_before(events[0].second)
        for event in events:
            if event.behaviour.kind is BehaviourKind.EXPOSURE:
                self._expose(event)
        for event in events:
            if event.behaviour.kind.is_take:
                takes.append(self._add_take(event))
        for take in takes:
            self._append(take)
        return takes

    def resolved(self, before: float) -> Iterator[Impression]:
        """Yield the impressions whose label is final once event time has reached `before`, oldest first."""
        while self._waiting and self._waiting[0].second + self._attribution < before:
            impression = self._waiting.popleft()
            self._unname(impression)
            if self._correctable is not None:
                self._correctable.add(impression)
            yield impression

    def corrections(self) -> list[Impression]:
        """Impressions corrected by late takes since the last call, in the order of the takes."""
        corrections, self._corrections = self._corrections, []
        return corrections

    def forget(self, user_id: str) -> list[Impression]:
        """Remove a user's history and unresolved impressions; returns the latter."""
        self._histories.pop(user_id, None)
        if self._correctable is not None:
            self._correctable.forget(user_id)
        own = [impression for impression in self._waiting if impression.user_id == user_id]
        if own:
            self._waiting = deque(impression for impression in self._waiting if impression.user_id != user_id)
        for impression in own:
            self._unname(impression)
        return own

    def snapshot(self) -> State:
        """Histories, the longest inactive first, and unresolved impressions, the oldest first."""
        state = State(values={})
        state.put_texts("users", self._histories)
        state.arrays.update(ragged("items", (history.items for history in self._histories.values())).arrays)
        state.arrays.update(ragged("seconds", (history.seconds for history in self._histories.values())).arrays)
        state.put("waiting", pack_impressions(self._waiting))
        state.values["too_late"] = self.too_late
        if self._correctable is not None:
            state.put("correctable", self._correctable.snapshot())
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        histories = zip(state.texts("users"), unragged("items", state), unragged("seconds", state), strict=True)
        self._histories = OrderedDict((user, _UserHistory(items, seconds)) for user, items, seconds in histories)
        self._waiting = deque(unpack_impressions(state.part("waiting")))
        self.too_late = state.values.get("too_late", 0)
        if self._correctable is not None and "correctable" in state.values:
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

    def _add_take(self, event: Observed) -> Take:
        behaviour = event.behaviour
        item = self._catalogue.number(behaviour.item_id)
        impression = self._answered(behaviour, item)
        if impression is not None:
            impression.label = 1
            if impression.taken_as is None or RELIABILITY[behaviour.kind] > RELIABILITY[impression.taken_as]:
                impression.taken_as = behaviour.kind
        elif self._correctable is not None:
            self._correct(self._correctable, event, item)
        return Take(event.second, behaviour.user_id, item)

    def _correct(self, correctable: CorrectableRows, event: Observed, item: int) -> None:
        behaviour = event.behaviour
        known = correctable.find(behaviour, item)
        late = correctable.pop_corrected(behaviour, item, event.second)
        if late is None:
            if known is None:
                self.too_late += behaviour.exposure_id is not None  # without a name it may have had no exposure
            else:
                self.too_late += correctable.is_late(known, behaviour.kind, event.second)
            return
        corrected = replace(
            late,
            event_id=behaviour.event_id,
            partition=event.partition,
            offset=event.offset,
            draw=0,
            label=1,
            taken_as=behaviour.kind,
            correction=True,
            upgrade=late.label == 1,
            exposure_id=late.shown_as,
        )
        self._corrections.append(corrected)
        correctable.add(corrected)

    def _answered(self, behaviour: Behaviour, item: int) -> Impression | None:
        if behaviour.exposure_id is not None:
            named = self._by_event.get(behaviour.exposure_id)
            # a take counts only for an exposure of the same user and item, whatever it names
            return named if named and (named.user_id, named.item) == (behaviour.user_id, item) else None
        return self._by_pair.get((behaviour.user_id, item))

    def _append(self, take: Take) -> None:
        history = self._histories.get(take.user_id)
        if history is None:
            history = self._histories[take.user_id] = _UserHistory()
            if len(self._histories) > self._max_users:
                self._histories.popitem(last=False)  # the user inactive for longest
        else:
            self._histories.move_to_end(take.user_id)
        history.items.append(take.item)
        history.seconds.append(take.second)
        if len(history.items) > self._length:
            del history.items[0], history.seconds[0]
