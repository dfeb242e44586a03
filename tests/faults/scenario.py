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
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Literal

from aiokafka.partitioner import murmur2

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
    "kill index",
    "kill record",
    "kill train",
    "kill serve",
    "kill broker",
    "freeze broker",
    "zombie index",
    "zombie train",
    "kill valkey",
    "kill milvus",
    "full disk",
    "clock jump index",
    "clock jump record",
    "clock jump train",
    "a worker joins and leaves",
    "deliver again",
    "behaviours created again",
    "items created again",
]

WEIGHTS: dict[Fault, int] = {
    "kill index": 6,
    "kill record": 5,
    "kill train": 6,
    "kill serve": 2,
    "kill broker": 4,
    "freeze broker": 3,
    "zombie index": 4,
    "zombie train": 3,
    "kill valkey": 4,
    "kill milvus": 4,
    "full disk": 3,
    "clock jump index": 1,
    "clock jump record": 1,
    "clock jump train": 1,
    "a worker joins and leaves": 3,
    "deliver again": 3,
    "behaviours created again": 1,
    "items created again": 1,
}
LONG: frozenset[Fault] = frozenset(
    {"zombie index", "zombie train", "behaviours created again", "items created again", "a worker joins and leaves"}
    | {"clock jump index", "clock jump record", "clock jump train"}
)
"""Faults that take a while; a round has one of them at most."""


@dataclass(frozen=True, slots=True)
class Sending:
    """One record to send."""

    topic: Literal["items", "behaviours"]
    key: bytes
    value: bytes | None


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
    names = list(WEIGHTS)
    first = rng.choices(names, [WEIGHTS[name] for name in names])[0]
    if rng.random() < 0.5:
        return (first,)
    second = rng.choices(names, [WEIGHTS[name] for name in names])[0]
    if second == first or (first in LONG and second in LONG) or first.endswith("again") or second.endswith("again"):
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
    sent = []
    for n in range(BATCH_ROWS):
        user = user_in(n % PARTITIONS)
        sent.append(behaviour(f"f{number}-{n}", "exposure", user, STABLE[n % len(STABLE)], base, 500 + n // PARTITIONS))
    for n in range(2 * PARTITIONS):
        user = user_in(n % PARTITIONS)
        sent.append(behaviour(f"t{number}-{n}", "exposure", user, STABLE[n], base, 1_000 + n // PARTITIONS))
    return sent


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
        found = []
        for burst in range(count):
            records = [*self._item_events(30), *self._behaviours(50, burst * 20)]
            # what may be anywhere: items and behaviours are different topics, and keep their own order
            found.append(tuple(self._shuffled_together(records)))
        return tuple(found)

    def _shuffled_together(self, records: list[Sending]) -> list[Sending]:
        items = [record for record in records if record.topic == "items"]
        others = [record for record in records if record.topic == "behaviours"]
        mixed = []
        while items or others:
            mixed.append((items if self._rng.random() < len(items) / (len(items) + len(others)) else others).pop(0))
        return mixed

    def _item_events(self, count: int) -> list[Sending]:
        """Publishes, updates and deletes of a few keys, hot enough that a batch holds several words on one item."""
        rng, found = self._rng, []
        for _ in range(count):
            self._items += 1
            item_id = f"item-{rng.randrange(60)}"
            what = rng.random()
            if what < 0.22:
                found.append(Sending("items", item_id.encode(), None))
            elif what < 0.27:
                found.append(self._broken_item(item_id))
            elif what < 0.37:  # only the price changes: the vector stays
                found.append(_item(item_id, f"{item_id} as ever", price=float(self._items)))
            else:
                found.append(_item(item_id, f"{item_id} word {self._number} {self._items}"))
        return found

    def _broken_item(self, item_id: str) -> Sending:
        value = self._rng.choice(
            (
                b"{not json",
                json.dumps({"item_id": item_id, "title": 5, "published_at": "2025-02-01T00:00:00Z"}).encode(),
                json.dumps({"item_id": "another", "title": "x", "published_at": "2025-02-01T00:00:00Z"}).encode(),
                json.dumps({"item_id": item_id, "published_at": "2025-02-01T00:00:00Z"}).encode(),
                json.dumps({"item_id": item_id, "title": "x", "published_at": "2025-02-01T00:00:00"}).encode(),
            )
        )
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
                found.append(
                    Sending(
                        "behaviours",
                        user.encode(),
                        rng.choice((b"{", b'{"event_id": "x"}', b'{"kind": "glance"}')) + b" " * (self._events % 7),
                    )
                )
            elif what < 0.14:
                found.append(self._event("exposure", user, item, second - 200))
            elif what < 0.24:
                found.append(self._event("exposure", user, item, at - rng.random() * 10))
            else:
                exposure = self._event("exposure", user, item, at)
                found.append(exposure)
                if rng.random() < 0.4:
                    event = json.loads(exposure.value or b"")
                    take = self._event("click", user, item, at + 1 + rng.random() * 8, exposure_id=event["event_id"])
                    found.insert(len(found) - rng.choice((0, 0, 1)), take)
        return found

    def _event(self, kind: str, user: str, item: str, second: float, **more: str) -> Sending:
        self._events += 1
        made = behaviour(f"e{self._number}-{self._events}", kind, user, item, self._base, round(second, 3), **more)
        self._sent = [*self._sent[-40:], made]
        return made


def described(plan: Plan) -> dict[str, object]:
    """A plan in a few words, for the report."""
    sent = [record for burst in plan.bursts for record in burst]
    return {
        "faults": list(plan.faults),
        "items_planned": sum(record.topic == "items" for record in sent),
        "behaviours_planned": sum(record.topic == "behaviours" for record in sent),
    }
