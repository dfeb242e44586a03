"""Joins exposures with what the user took and with his history as of that moment: the rows CiUBM learns from."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.numbering import ItemNumbers
from trainer.window import Observed

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
    """

    def __init__(
        self, catalogue: ItemNumbers, *, history_length: int, attribution_seconds: float, max_users: int
    ) -> None:
        self._catalogue = catalogue
        self._length = history_length
        self._attribution = attribution_seconds
        self._max_users = max_users
        self._histories: OrderedDict[str, _UserHistory] = OrderedDict()
        self._waiting: deque[Impression] = deque()
        self._by_event: dict[str, Impression] = {}
        self._by_pair: dict[tuple[str, int], Impression] = {}

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
            del self._by_event[impression.event_id]
            pair = (impression.user_id, impression.item)
            if self._by_pair.get(pair) is impression:
                del self._by_pair[pair]
            yield impression

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
