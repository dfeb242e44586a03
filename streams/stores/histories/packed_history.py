"""Data of one user in the behaviour store, and how a batch of the click log changes it. No I/O.

Two packed values per user:

    takes     the items taken last, each at its newest take (`trainer.samples.histories`), oldest first; equal times in
              order of arrival
    recent    64-bit hashes of the ids of the user's last events of any kind, in order of arrival

An event is a duplicate if its id is among `recent`, or is that of a take that is still kept. Older duplicates are not
recognised; a replay of the log is recognised by its offsets, not by ids.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import Misconfigured
from streams.broker.records import BehaviourRecord
from trainer.samples.histories import newest_only, place_of

_LAYOUT = b"\x01"
_HASH_BYTES = 8
_KINDS = (BehaviourKind.CLICK, BehaviourKind.CART, BehaviourKind.PURCHASE)
_CODE_OF_KIND = {kind: code for code, kind in enumerate(_KINDS)}


class TakenItem(NamedTuple):
    """An item that a user took."""

    item_id: str
    occurred_at: float
    """Event time of its newest take, seconds since 1970."""
    kind: BehaviourKind
    """The most reliable kind of take of it, while it is kept."""


@dataclass(frozen=True, slots=True)
class RecordReport:
    """Result of recording one batch of one partition."""

    partition: int
    next_offset: int
    """Position of the partition in the store afterwards."""
    exposures: int = 0
    """New exposures, counted."""
    takes: int = 0
    """New takes."""
    duplicates: int = 0
    """Events whose id had been seen."""
    broken: int = 0
    """Records that could not be read."""
    erased: int = 0
    """Records of users who asked to be forgotten after them: passed over."""
    replayed: int = 0
    """Records below the stored position: recorded before, ignored."""
    users: int = 0
    """Users whose data changed."""
    resume_from: int | None = None
    """If set, nothing was written: the store is behind this batch; read the log again from here."""
    seconds: float = 0.0
    """Duration, decoding included."""

    @property
    def stored(self) -> int:
        """New events of all kinds."""
        return self.exposures + self.takes


@dataclass(slots=True)
class UserTakes:
    """One user's data, in memory. Parallel lists: they pack into bytes and back without an object per take."""

    times: list[float] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    kinds: bytearray = field(default_factory=bytearray)
    ids: list[bytes] = field(default_factory=list)
    recent: bytes = b""
    """Concatenated hashes, as they are stored: most events need only a search in them."""

    def observe(self, behaviour: Behaviour, *, length: int, remembered: int) -> bool:
        """Add one event; False if it is a duplicate, which changes nothing."""
        id_hash = hash_of(behaviour.event_id)
        if contains_hash(self.recent, id_hash):
            return False
        if behaviour.kind is BehaviourKind.EXPOSURE:
            self._remember(id_hash, remembered)
            return True
        if id_hash in self.ids:
            return False
        self._remember(id_hash, remembered)
        at = behaviour.occurred_at.timestamp()
        kind = _CODE_OF_KIND[behaviour.kind]
        where, former = place_of(self.items, self.times, behaviour.item_id, at)
        if former is not None:
            kind = max(kind, self.kinds[former])
            if where is None:
                self.kinds[former] = kind
                return True
            for column in (self.times, self.items, self.kinds, self.ids):
                del column[former]
        assert where is not None  # only behind a newer take of the item
        self.times.insert(where, at)
        self.items.insert(where, behaviour.item_id)
        self.kinds.insert(where, kind)
        self.ids.insert(where, id_hash)
        if len(self.times) > length:
            for column in (self.times, self.items, self.kinds, self.ids):
                del column[: len(column) - length]
        return True

    def _remember(self, id_hash: bytes, remembered: int) -> None:
        self.recent = (self.recent + id_hash)[-_HASH_BYTES * remembered :]

    def remove_items(self, items: Collection[str]) -> int:
        """Remove takes of these items; returns how many. Their event ids still count as seen."""
        kept = [place for place, item in enumerate(self.items) if item not in items]
        removed = len(self.items) - len(kept)
        self._keep(kept)
        return removed

    def keep_newest(self) -> None:
        """Keep each item's newest take alone: earlier builds kept all."""
        if len(set(self.items)) == len(self.items):
            return
        best: dict[str, int] = {}
        for item, kind in zip(self.items, self.kinds, strict=True):
            best[item] = max(kind, best.get(item, 0))
        self._keep(newest_only(self.items))
        self.kinds = bytearray(best[item] for item in self.items)

    def _keep(self, places: Sequence[int]) -> None:
        self.times = [self.times[place] for place in places]
        self.ids = [self.ids[place] for place in places]
        self.kinds = bytearray(self.kinds[place] for place in places)
        self.items = [self.items[place] for place in places]

    def history(self) -> list[TakenItem]:
        """Oldest first."""
        return [
            TakenItem(item, at, _KINDS[kind]) for item, at, kind in zip(self.items, self.times, self.kinds, strict=True)
        ]


def hash_of(event_id: str) -> bytes:
    """64 bits of an event id, the same in every process."""
    return blake2b(event_id.encode(), digest_size=_HASH_BYTES).digest()


def contains_hash(hashes: bytes, wanted: bytes) -> bool:
    """Whether `wanted` is one of the concatenated hashes."""
    at = hashes.find(wanted)
    while at % _HASH_BYTES and at >= 0:  # across two hashes: not one of them
        at = hashes.find(wanted, at + 1)
    return at >= 0


def pack_takes(user: UserTakes) -> bytes:
    """Pack `takes`: layout, count, times (float64), id hashes, kinds (uint8), items by line; little-endian."""
    n = len(user.times)
    return b"".join(
        (
            _LAYOUT,
            struct.pack(f"<I{n}d", n, *user.times),
            *user.ids,
            bytes(user.kinds),
            "\n".join(user.items).encode(),  # identifiers are printable: no line ends in them
        )
    )


def unpack_takes(packed: bytes | None, user: UserTakes) -> None:
    """Fill `user` from the bytes of `pack_takes`. Raises `Misconfigured` for the bytes of another layout."""
    if not packed:
        return
    n, times, kinds, items = _layout(packed)
    user.times = list(struct.unpack_from(f"<{n}d", packed, times))
    user.ids = [packed[at : at + _HASH_BYTES] for at in range(times + 8 * n, kinds, _HASH_BYTES)]
    user.kinds = bytearray(packed[kinds:items])
    user.items = packed[items:].decode().split("\n") if n else []
    user.keep_newest()


def without_items(packed: bytes, items: Collection[str]) -> tuple[bytes, int]:
    """`pack_takes`'s bytes without takes of these items (empty if none is left), and how many were removed."""
    user = UserTakes()
    unpack_takes(packed, user)
    removed = user.remove_items(items)
    return pack_takes(user) if user.items else b"", removed


def _layout(packed: bytes) -> tuple[int, int, int, int]:
    """Number of takes, and the offsets of times, kinds and items."""
    if packed[:1] != _LAYOUT:
        raise Misconfigured(
            f"the behaviour store holds data of an unknown layout ({packed[:1]!r}), written by another version; "
            "run 'mimstream record --rebuild'"
        )
    (n,) = struct.unpack_from("<I", packed, 1)
    return n, 5, 5 + (8 + _HASH_BYTES) * n, 5 + (8 + _HASH_BYTES + 1) * n


def packed_history(packed: bytes | None) -> list[TakenItem]:
    """`UserTakes.history` of `pack_takes`'s bytes. Raises as `unpack_takes` does."""
    user = UserTakes()
    unpack_takes(packed, user)
    return user.history()


def packed_items(packed: bytes | None) -> list[str]:
    """The items alone of `packed_history`. Raises as `unpack_takes` does."""
    if not packed:
        return []
    n, _, _, start = _layout(packed)
    items = packed[start:].decode().split("\n") if n else []
    return items if len(set(items)) == n else [items[place] for place in newest_only(items)]


def packed_takes(packed: bytes | None) -> tuple[list[str], list[int]]:
    """`packed_items`, and the second of each take. Raises as `unpack_takes` does."""
    if not packed:
        return [], []
    n, times, _, start = _layout(packed)
    items = packed[start:].decode().split("\n") if n else []
    seconds = [math.floor(at) for at in struct.unpack_from(f"<{n}d", packed, times)]
    if len(set(items)) == n:
        return items, seconds
    kept = newest_only(items)
    return [items[place] for place in kept], [seconds[place] for place in kept]


def fresh_part(events: Sequence[BehaviourRecord], *, stored: int) -> Sequence[BehaviourRecord]:
    """Leave out events that the store has recorded already."""
    if not events or events[0].offset >= stored:
        return events
    return [event for event in events if event.offset >= stored]


def apply_batch(
    users: Mapping[str, UserTakes],
    events: Sequence[BehaviourRecord],
    *,
    partition: int,
    next_offset: int,
    length: int,
    remembered: int,
) -> tuple[RecordReport, set[str], set[str]]:
    """Apply `events` to `users` (which holds all of them), in order.

    Returns the report, the users whose `recent` changed and those whose `takes` changed. The result does not depend
    on how a partition is cut into batches.
    """
    exposures = takes = duplicates = broken = 0
    changed: set[str] = set()
    took: set[str] = set()
    for _, behaviour in events:
        if behaviour is None:
            broken += 1
        elif not users[behaviour.user_id].observe(behaviour, length=length, remembered=remembered):
            duplicates += 1
        else:
            changed.add(behaviour.user_id)
            if behaviour.kind.is_take:
                takes += 1
                took.add(behaviour.user_id)
            else:
                exposures += 1
    report = RecordReport(
        partition=partition,
        next_offset=next_offset,
        exposures=exposures,
        takes=takes,
        duplicates=duplicates,
        broken=broken,
        users=len(changed),
    )
    return report, changed, took


def without_erased(
    events: Sequence[BehaviourRecord], ends: Mapping[str, Mapping[int, int]], *, partition: int
) -> list[BehaviourRecord]:
    """Leave out what lies below the ends of users who were forgotten (user, then partition, to offset)."""
    return [
        event
        for event in events
        if event.behaviour is None or event.offset >= ends.get(event.behaviour.user_id, {}).get(partition, 0)
    ]


def skipped(report: RecordReport, *, replayed: int, erased: int) -> RecordReport:
    """Complete the report with the numbers of ignored records."""
    return replace(report, replayed=replayed, erased=erased)
