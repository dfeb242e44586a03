"""What a round does, drawn from its seed alone: the records that are sent, and what breaks while they are on their way.

Event times of a round lie two thousand seconds after those of the round before. It ends with ticks far enough ahead
that the trainer can settle everything before them:

```text
base            base + 120        base + 500              base + 1000, + 1001
|<--- the round's behaviours --->| fillers, a full batch  two ticks in each partition
```
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Literal, NamedTuple

from aiokafka.partitioner import murmur2

from tests.faults.pictures import COLOURS, address

PARTITIONS = 4
LATENESS_SECONDS = 30
ATTRIBUTION_SECONDS = 20
BATCH_ROWS = 16
START = datetime(2025, 3, 1, tzinfo=UTC)
ROUND_SECONDS = 2_000

STABLE = [f"shelf-{n}" for n in range(24)]
"""Items that are published once and neither change nor go: what behaviours are about, so that no row waits for one."""
USERS = [f"user-{n}" for n in range(12)]

Fault = Literal[
    "kill index", "kill record", "kill train", "kill serve", "kill broker", "freeze broker", "zombie index",
    "zombie train", "kill valkey", "kill milvus", "full disk", "clock jump index", "clock jump record",
    "clock jump train", "a worker joins and leaves", "deliver again", "behaviours created again", "items created again",
]  # fmt: skip


Way = Literal["plain", "crc32", "committed", "aborted"]
"""Sent by an idempotent producer, by one that hashes keys as librdkafka does, or in a transaction."""


class Kind(NamedTuple):
    """What is to be known of a fault besides how it strikes."""

    weight: int
    """How often it is drawn, in relation to others."""
    concerned: tuple[str, ...]
    """Whose un-acknowledged work counts at the moment of the fault."""
    subject: str | None = None
    """Faults of one subject wait for each other; others may overlap."""
    is_long: bool = False
    """It takes a while; a round has one such fault at most."""


FAULTS: dict[Fault, Kind] = {
    "kill index": Kind(6, ("index",), "index"),
    "kill record": Kind(5, ("record",)),
    "kill train": Kind(6, ("train",), "train"),
    "kill serve": Kind(2, ("index",)),
    "kill broker": Kind(4, ("index", "record"), "kafka"),
    "freeze broker": Kind(3, ("index", "record"), "kafka"),
    "zombie index": Kind(4, ("index",), "index", is_long=True),
    "zombie train": Kind(3, ("train",), "train", is_long=True),
    "kill valkey": Kind(4, ("record",)),
    "kill milvus": Kind(4, ("index",)),
    "full disk": Kind(3, ("train",), "train"),
    "clock jump index": Kind(1, ("index",), "index", is_long=True),
    "clock jump record": Kind(1, ("record",), is_long=True),
    "clock jump train": Kind(1, ("train",), "train", is_long=True),
    "a worker joins and leaves": Kind(3, ("index",), "index", is_long=True),
    "deliver again": Kind(3, ("index",), "index"),
    "behaviours created again": Kind(1, ("record", "train"), is_long=True),
    "items created again": Kind(1, ("index",), "index", is_long=True),
}


@dataclass(frozen=True, slots=True)
class Sending:
    """One record to send."""

    topic: Literal["items", "behaviours"]
    key: bytes
    value: bytes | None
    way: Way = "plain"

    @property
    def partition(self) -> int | None:
        """Where its producer puts it; None: where ours does."""
        return zlib.crc32(self.key) % PARTITIONS if self.way == "crc32" else None


@dataclass(frozen=True)
class Plan:
    """One round."""

    number: int
    faults: tuple[Fault, ...]
    bursts: tuple[tuple[Sending, ...], ...]
    """Sent one after the other, each as fast as the broker takes it."""
    fault_bursts: tuple[int, ...]
    """While which burst each fault happens."""
    delays: tuple[float, ...]
    """Seconds between the first acknowledgements of that burst and the fault."""
    pauses: tuple[float, ...]
    """Seconds that what a fault took away stays away."""
    seed: int
    """For what the fault itself draws."""
    fillers: tuple[Sending, ...]


def plan_round(number: int, seed: int, faults: Sequence[Fault] | None = None) -> Plan:
    """The round of this number."""
    rng = random.Random(f"{seed}/{number}")
    chosen = tuple(faults) if faults else _draw_faults(rng)
    bursts = _Round(number, rng).bursts(rng.randint(4, 6))
    return Plan(
        number=number,
        faults=chosen,
        bursts=bursts,
        fault_bursts=tuple(sorted(rng.randrange(1, len(bursts) - 1) for _ in chosen)),
        delays=tuple(rng.choice((0.0, 0.0, rng.random() * 0.05)) for _ in chosen),
        pauses=tuple(rng.random() * 1.5 for _ in chosen),
        seed=rng.randrange(1 << 30),
        fillers=tuple(fillers(number)),
    )


def _draw_faults(rng: random.Random) -> tuple[Fault, ...]:
    names, weights = list(FAULTS), [kind.weight for kind in FAULTS.values()]
    (first,) = rng.choices(names, weights)
    if rng.random() < 0.5:
        return (first,)
    (second,) = rng.choices(names, weights)
    both_long = FAULTS[first].is_long and FAULTS[second].is_long
    if second == first or both_long or first.endswith("again") or second.endswith("again"):
        return (first,)
    return (first, second)


@cache
def user_in(partition: int) -> str:
    """A user whose events lie in this partition and who does nothing else."""
    n = 0
    while (murmur2(f"tick-{partition}-{n}".encode()) & 0x7FFFFFFF) % PARTITIONS != partition:
        n += 1
    return f"tick-{partition}-{n}"


def fillers(number: int) -> list[Sending]:
    """The end of a round: exposures that fill its last batch, then two ticks in each partition."""
    base = START + timedelta(seconds=number * ROUND_SECONDS)
    return [
        behaviour(f"{kind}{number}-{n}", "exposure", user_in(n % PARTITIONS), STABLE[n], base, second + n // PARTITIONS)
        for kind, count, second in (("f", BATCH_ROWS, 500), ("t", 2 * PARTITIONS, 1_000))
        for n in range(count)
    ]


def behaviour(event_id: str, kind: str, user: str, item: str, base: datetime, second: float, **more: str) -> Sending:
    """One event of the click log."""
    at = base + timedelta(seconds=second)
    event = {"event_id": event_id, "kind": kind, "user_id": user, "item_id": item, "occurred_at": at.isoformat()}
    return Sending("behaviours", user.encode(), json.dumps(event | more).encode())


def shelf() -> list[Sending]:
    """The items that stay."""
    return [_item(item_id, f"a thing on shelf {n}") for n, item_id in enumerate(STABLE)]


def _item(item_id: str, title: str, **more: object) -> Sending:
    item = {"item_id": item_id, "title": title, "published_at": "2025-02-01T00:00:00Z", **more}
    return Sending("items", item_id.encode(), json.dumps(item).encode())


class _Round:
    """Makes the records of one round."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self._number = number
        self._rng = rng
        self._base = START + timedelta(seconds=number * ROUND_SECONDS)
        self._events = 0
        self._items = 0
        self._sent: list[Sending] = []

    def bursts(self, count: int) -> tuple[tuple[Sending, ...], ...]:
        """All bursts; event time moves on by twenty seconds from one to the next."""
        # what may be anywhere: items and behaviours are different topics, and keep their own order
        return tuple(self._mixed(self._item_events(30), self._behaviours(50, burst * 20)) for burst in range(count))

    def _mixed(self, items: list[Sending], others: list[Sending]) -> tuple[Sending, ...]:
        mixed = []
        while items or others:
            mixed.append((items if self._rng.random() < len(items) / (len(items) + len(others)) else others).pop(0))
        return tuple(mixed)

    def _item_events(self, count: int) -> list[Sending]:
        """Publishes, updates and deletes of a few keys, hot enough that a batch holds several words on one item."""
        rng, found = self._rng, []
        for _ in range(count):
            self._items += 1
            item_id = f"item-{rng.randrange(60)}"
            what = rng.random()
            if what < 0.22:
                sending = Sending("items", item_id.encode(), None)
            elif what < 0.27:
                sending = self._broken_item(item_id)
            elif what < 0.37:  # only the price changes: the vector stays
                sending = _item(item_id, f"{item_id} as ever", price=float(self._items))
            elif what < 0.43:
                sending = self._late_picture(item_id)
            else:
                sending = _item(item_id, f"{item_id} word {self._number} {self._items}")
            (way,) = rng.choices(("plain", "crc32", "committed", "aborted"), (24, 4, 1, 1))
            found.append(replace(sending, way=way))
        return found

    def _late_picture(self, item_id: str) -> Sending:
        """An item whose picture comes after a few requests; some have nothing else, and wait without a vector."""
        number = self._number * 1_000 + self._items
        url = address(self._rng.choice(COLOURS), self._rng.choice((0, 1, 2)), number)
        return _item(item_id, self._rng.choice(("", f"{item_id} with picture {number}")), image_url=url)

    def _broken_item(self, item_id: str) -> Sending:
        wrong: tuple[dict[str, object], ...] = (
            {"item_id": item_id, "title": 5, "published_at": "2025-02-01T00:00:00Z"},
            {"item_id": "another", "title": "x", "published_at": "2025-02-01T00:00:00Z"},
            {"item_id": item_id, "published_at": "2025-02-01T00:00:00Z"},
            {"item_id": item_id, "title": "x", "published_at": "2025-02-01T00:00:00"},
        )
        value = self._rng.choice((b"{not json", *(json.dumps(event).encode() for event in wrong)))
        return Sending("items", item_id.encode(), value)

    def _behaviours(self, count: int, second: float) -> list[Sending]:
        """Exposures and their takes; some repeated, some out of order within the lateness, some late, some broken."""
        rng, found = self._rng, []
        while len(found) < count:
            self._events += 1
            user, item = rng.choice(USERS), rng.choice(STABLE)
            what = rng.random()
            at = second + rng.random() * 20
            if what < 0.06 and self._sent:
                found.append(rng.choice(self._sent))
            elif what < 0.10:
                broken = rng.choice((b"{", b'{"event_id": "x"}', b'{"kind": "glance"}'))
                found.append(Sending("behaviours", user.encode(), broken + b" " * (self._events % 7)))
            elif what < 0.14:
                found.append(self._event("exposure", user, item, second - 200, **self._before()))
            elif what < 0.24:
                found.append(self._event("exposure", user, item, at - rng.random() * 10, **self._before()))
            else:
                exposure = self._event("exposure", user, item, at, **self._before())
                found.append(exposure)
                if rng.random() < 0.4:
                    event = json.loads(exposure.value or b"")
                    take = self._event("click", user, item, at + 1 + rng.random() * 8, exposure_id=event["event_id"])
                    found.insert(len(found) - rng.choice((0, 0, 1)), take)
        return found

    def _before(self) -> dict[str, str]:
        """What led to an exposure: words that many search for, words that nobody searched for yet, an item, nothing."""
        rng, found = self._rng, {}
        what = rng.random()
        if what < 0.3:
            new = f"words {self._number} {self._events}"
            found["query_text"] = new if what < 0.1 else f"a thing on shelf {rng.randrange(8)}"
        if rng.random() < 0.2:
            found["trigger_item"] = rng.choice(STABLE)
        return found

    def _event(self, kind: str, user: str, item: str, second: float, **more: str) -> Sending:
        self._events += 1
        made = behaviour(f"e{self._number}-{self._events}", kind, user, item, self._base, round(second, 3), **more)
        self._sent = [*self._sent[-40:], made]
        return made
