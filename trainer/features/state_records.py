"""States of items as records of a topic, exactly: what a trainer has to write, and the copies that a server keeps.

```text
FeatureState ──> StateWriter ──> records; the last one of a write is its head ──> StateCopies ──> ItemStates
```
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from schemas.item_states import MOST_WRITES, ItemState, StateHead, parse_state_key, state_key, state_value
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.states import NEVER, ItemStates, SharedCounts, TakeRows, item_hash, trigger_hashes
from trainer.samples.item_facts import FactRows

Record = tuple[bytes, bytes | None]
"""Key, and value or None for a tombstone."""

_HELD_BACK = 10_000
"""Records of a write that are kept until it is complete; of a longer one some are used before."""
_SHARE_DROPPED = 100


@dataclass(frozen=True)
class StateWrite:
    """Records to write all or none of, in this order."""

    records: Sequence[Record]
    head: StateHead
    items: Sequence[int]
    """The items that they are of."""


class StateWriter:
    """Decides what a topic of states has to be told: the items that changed since it was told of them.

    `heard` gives it what the topic holds at the start, whoever wrote it: what differs from the state counts as changed.
    So nothing depends on what an earlier process knew, and a state that began anew removes what is not its own.
    """

    def __init__(self, config: FeatureConfig, *, log: str) -> None:
        """`log` is Kafka's id of the topic whose takes are counted."""
        self._version = config.version
        self._log = log
        self._held: dict[int, bytes] | None = {}
        self._head: StateHead | None = None
        self._unwritten: dict[int, None] = {}
        self._has_written = False
        self.takes = 0
        """Takes counted when something was written last."""

    def heard(self, key: bytes | None, value: bytes | None) -> None:
        """Note one record that the topic holds. One that cannot be read is written again."""
        try:
            version, item = parse_state_key(key)
        except ValueError:
            return
        if version != self._version or self._held is None:
            return
        if item is None:
            try:
                self._head = None if value is None else ItemState.model_validate_json(value).head
            except ValueError:
                self._head = None
        elif value is None:
            self._held.pop(item, None)
        else:
            self._held[item] = _digest(value)

    def is_late(self, state: FeatureState) -> bool:
        """Whether the topic is ahead of this state, of the same log: then servers keep what they have."""
        head = self._head
        return head is not None and head.log == self._log and state.before < head.before

    def next(self, state: FeatureState, *, most: int, hold: bool = False) -> StateWrite | None:
        """What to write now, of at most so many items; None if nothing changed, or while the state is late.

        With `hold` the state is told to keep itself as the write leaves servers, if the write is all that is left.
        """
        if self.is_late(state):
            return None
        if self._held is not None:
            held, self._held = self._held, None
            differ = (key for key in state.keys if (held.pop(key, b"") != _digest(self._item(state, key)[1] or b"")))
            self._unwritten |= dict.fromkeys(differ)
            self._unwritten |= dict.fromkeys(held)  # what is left is not in the state
        self._unwritten |= dict.fromkeys(state.changed_keys or ())
        state.changed_keys = set()
        if not self._unwritten and self._has_written:
            return None
        items = list(self._unwritten)[:most]
        head = StateHead(
            number=1 + (0 if self._head is None else self._head.number % MOST_WRITES),
            before=state.before,
            left=len(self._unwritten) - len(items),
            log=self._log,
            held=hold and len(items) == len(self._unwritten),
        )
        if head.held:
            state.hold()
        records = [self._item(state, key) for key in items]
        records.append((state_key(self._version, None), state_value(self._version, state.shared.to_bytes(), head)))
        return StateWrite(records, head, items)

    def begin_anew(self) -> None:
        """The topic was replaced by one that holds nothing: `next` writes all of the state again."""
        self._held, self._has_written = {}, False

    def written(self, write: StateWrite, *, takes: int) -> None:
        """Note that this write is in the topic. What changed since it was made is kept for the next."""
        self._head, self._has_written, self.takes = write.head, True, takes
        for key in write.items:
            self._unwritten.pop(key, None)

    @property
    def left(self) -> int:
        """Items of `next` that are not written yet."""
        return len(self._unwritten)

    def _item(self, state: FeatureState, key: int) -> Record:
        record = state.record(key)
        return state_key(self._version, key), None if record is None else state_value(self._version, record)


def _digest(value: bytes) -> bytes:
    return blake2b(value, digest_size=8).digest()


class StateCopies:
    """The states that a server computes features from: as the newest complete write left them.

    Bounded by `max_items` of the features; beyond, those longest without a take are dropped, as the trainer does.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self._record_bytes = len(TakeRows.empty(config, 1).to_bytes(0))
        self.clear()

    def clear(self) -> None:
        """Nothing was taken yet."""
        self.head: StateHead | None = None
        """Of the newest write that was applied; None before the first."""
        self._shared = SharedCounts.empty()
        self._rows = TakeRows.empty(self.config, 1 + self.config.max_items)  # of which the system gives what is used
        self._slot: dict[int, int] = {}
        self._free: list[int] = []
        self._pending: dict[int, bytes | None] = {}
        self._is_between = False

    def __len__(self) -> int:
        return len(self._slot)

    @property
    def complete(self) -> bool:
        """Whether the copies together are the trainer's state at `head`."""
        return self.head is not None and not self.head.left and not self._pending

    @property
    def held_head(self) -> StateHead | None:
        """The head, if the copies are a state that its trainer keeps."""
        return None if self.head is None or not self.head.held or self._is_between else self.head

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Apply one record; what was written for other features is passed over.

        Raises `ValueError` for one that cannot be read; its item then counts as never taken. Without a head that can be
        read, the copies stay as the write before left them.
        """
        version, item = parse_state_key(key)
        if version != self.config.version:
            return
        if item is None:
            self._apply_head(value)
            return
        self._pending[item] = None
        if value is not None:
            message = self._read(value)
            state = message.state
            if message.head is not None:
                raise ValueError("the record of an item has a head")
            if len(state) != self._record_bytes:
                raise ValueError(f"a record of {len(state)} bytes, not of {self._record_bytes}")
            if not TakeRows.counts_are_finite(state):
                raise ValueError("counts that are negative, or no numbers")
            self._pending[item] = state
        if len(self._pending) >= min(_HELD_BACK, self.config.max_items):
            self._is_between = True
            self._apply_pending()

    def _apply_head(self, value: bytes | None) -> None:
        message = None if value is None else self._read(value)
        if message is None or message.head is None:
            raise ValueError("the record of all items has no head")
        shared = SharedCounts.from_bytes(message.state)
        self._apply_pending()
        self._shared, self.head = shared, message.head
        self._is_between = False

    def _read(self, value: bytes) -> ItemState:
        message = ItemState.model_validate_json(value)
        if message.features != self.config.version:
            raise ValueError(f"a record of features {message.features} under a key of {self.config.version}")
        return message

    def _apply_pending(self) -> None:
        pending, self._pending = self._pending, {}
        self._free += [slot for key, record in pending.items() if not record and (slot := self._slot.pop(key, 0))]
        records = {key: record for key, record in pending.items() if record}
        rows = TakeRows.from_bytes(self.config, list(records.values()))
        self._make_room(records.keys())
        slots = np.array([self._slot_of(key) for key in records], np.int64)
        for name, column in vars(rows).items():
            getattr(self._rows, name)[slots] = column

    def _slot_of(self, key: int) -> int:
        slot = self._slot.get(key)
        if slot is None:
            slot = self._slot[key] = self._free.pop() if self._free else len(self._slot) + 1
        return slot

    def _make_room(self, wanted: Collection[int]) -> None:
        short = len(self._slot) + sum(key not in self._slot for key in wanted) - self.config.max_items
        if short <= 0:
            return
        others = [key for key in self._slot if key not in wanted]
        last = self._rows.last_U[[self._slot[key] for key in others]]
        for place in np.argsort(last, kind="stable")[: max(short, self.config.max_items // _SHARE_DROPPED)].tolist():
            self._free.append(self._slot.pop(others[place]))

    def states(self, hashes_U2: NDArray[np.int64], facts: FactRows) -> ItemStates:
        """What features read of the items with these hashes, shape (U, 2), and facts; row 0 is padding.

        An item without a copy was never taken.
        """
        before = NEVER if self.head is None else self.head.before
        takes, triggered = self._of(hashes_U2), None
        if self.config.queries:
            triggered = self._of(trigger_hashes(hashes_U2))
        return ItemStates(item_hash(hashes_U2), facts, takes, self._shared, before, triggered)

    def _of(self, hashes_U2: NDArray[np.int64]) -> TakeRows:
        slot = self._slot
        return self._rows.rows(np.array([slot.get(key, 0) for key in hashes_U2[:, 0].tolist()], np.int64))
