"""Exposures for a click log that holds none: drawn from what others took around the moment of a take.

A take that answers no exposure gets one of its own, and a few beside it that were not taken. Items are drawn as often
as they are taken within `window_seconds` before and after, since with draws from the past alone every new item would be
a positive; so a second is joined only when the log is known up to `window_seconds` behind it. What is drawn depends on
the log alone: each take seeds its own draws. The journal keeps what was drawn, because a user who is forgotten later
was part of others' draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple, Protocol

from trainer.samples.window import Observed
from trainer.state import State, whole_numbers

_MOST_TAKES = 100_000
_TRIES = 16


class Drawn(NamedTuple):
    """An item with the take that it was drawn from; no event where that is not known."""

    item_id: str
    event_id: str = ""
    second: int = 0


class Draws(Protocol):
    """What a join asks for the exposures beside a take."""

    def move_to(self, events: list[Observed], ahead: Callable[[int, int], Iterable[list[Observed]]]) -> None:
        """Make the second of `events` the moment; `ahead` gives the later seconds between two, both included."""
        ...

    def draw(self, take: Observed, *, fits: Callable[[str], bool]) -> list[Drawn]:
        """Items beside a take, in the order of their running numbers."""
        ...


class ExposureDraws:
    """The takes around the second that is being joined, and draws from them."""

    def __init__(self, *, per_take: int, window_seconds: float) -> None:
        self.per_take = per_take
        self._window = int(window_seconds)
        # of a busy second a fixed number of takes is kept, chosen by their ids: memory is bounded on both sides alike
        self._per_second = max(1, _MOST_TAKES // (2 * self._window + 1))
        self._takes: deque[tuple[int, str, str, str]] = deque()
        self._last: dict[tuple[str, str], int] = {}
        self._until = -(1 << 62)

    def move_to(self, events: list[Observed], ahead: Callable[[int, int], Iterable[list[Observed]]]) -> None:
        """Make the second of `events` the moment; `ahead` gives the later seconds between two, both included."""
        second = events[0].second
        if second > self._until:
            self._add(events)
        for later in ahead(max(self._until, second) + 1, second + self._window):
            self._add(later)
        self._until = second + self._window
        while self._takes and self._takes[0][0] < second - self._window:
            self._remove(self._takes.popleft())

    def _add(self, events: list[Observed]) -> None:
        takes = [event for event in events if event.behaviour.kind.is_take]
        if len(takes) > self._per_second:
            takes = sorted(takes, key=lambda event: _digest(event.behaviour.event_id))[: self._per_second]
        for event in takes:
            behaviour = event.behaviour
            self._takes.append((event.second, behaviour.item_id, behaviour.user_id, behaviour.event_id))
            self._last[event.behaviour.user_id, event.behaviour.item_id] = event.second

    def _remove(self, take: tuple[int, str, str, str]) -> None:
        second, item, user, _ = take
        if self._last.get((user, item)) == second:
            del self._last[user, item]

    def draw(self, take: Observed, *, fits: Callable[[str], bool]) -> list[Drawn]:
        """Different items for a take, fewer where the window has too few; none that the user takes then or later.

        An item that they took before may be drawn, as it may be shown: if it never were, having taken it would tell
        that a row is taken. `fits` says which items may be drawn at all.
        """
        user, chosen = take.behaviour.user_id, {take.behaviour.item_id: Drawn(take.behaviour.item_id)}
        places = self._places(take.behaviour.event_id)
        for _ in range(_TRIES * self.per_take if self._takes else 0):
            if len(chosen) > self.per_take:
                break
            second, item, _, event_id = self._takes[next(places)]
            if item not in chosen and self._last.get((user, item), -1) < take.second and fits(item):
                chosen[item] = Drawn(item, event_id, second)
        return list(chosen.values())[1:]

    def _places(self, seed: str) -> Iterator[int]:
        number = 0
        while True:
            digest = _digest(f"{number}\0{seed}")
            for start in range(0, len(digest), 8):
                yield int.from_bytes(digest[start : start + 8], "little") % len(self._takes)
            number += 1

    def items(self) -> Iterator[str]:
        """Items of the takes."""
        return (item for _, item, _, _ in self._takes)

    def forget(self, user_id: str) -> None:
        """Remove a user's takes."""
        for take in self._takes:
            if take[2] == user_id:
                self._remove(take)
        self._takes = deque(take for take in self._takes if take[2] != user_id)

    def snapshot(self) -> State:
        """The takes, and up to where they are known."""
        state, takes = State(values={"until": self._until}), list(self._takes)
        state.later(lambda: _packed(takes))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        seconds, items, users = state.arrays["seconds"].tolist(), state.texts("items"), state.texts("users")
        events = state.texts("events") if "events.ends" in state.arrays else [""] * len(items)  # an earlier build
        self._takes = deque(zip(seconds, items, users, events, strict=True))
        self._until = state.values["until"]
        self._last = {(user, item): second for second, item, user, _ in self._takes}


class DrawnBefore:
    """Draws that training made and its journal kept, by partition, offset and running number (from 2).

    Drawing again could not give the same once a user has been forgotten: others' draws came from their takes too.
    """

    def __init__(self, items: Mapping[tuple[int, int, int], str]) -> None:
        self._items = items
        self._last = max((number for _, _, number in items), default=1)

    def move_to(self, events: list[Observed], ahead: Callable[[int, int], Iterable[list[Observed]]]) -> None:
        """Nothing is drawn, so nothing has to be known."""

    def draw(self, take: Observed, *, fits: Callable[[str], bool]) -> list[Drawn]:
        """The items kept; the take's own where another stretch of training used the draw."""
        place, own = (take.partition, take.offset), take.behaviour.item_id
        return [Drawn(self._items.get((*place, number), own)) for number in range(2, self._last + 1)]


def _packed(takes: list[tuple[int, str, str, str]]) -> State:
    state = State({"seconds": whole_numbers(take[0] for take in takes)})
    for place, name in enumerate(("items", "users", "events"), 1):
        state.put_texts(name, (str(take[place]) for take in takes))
    return state


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=64).digest()


def nothing_ahead(first: int, last: int) -> Collection[list[Observed]]:
    """For a join that draws no exposures."""
    return ()
