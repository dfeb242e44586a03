"""States of items as the trainer counts them, for those who compute the features of the moment: topic `item-states`."""

from __future__ import annotations

import base64
import re
from typing import Annotated

from pydantic import Field

from schemas.base import Base64, Message
from schemas.versions import SchemaVersion

FeatureVersion = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Version of a feature set: a hash of the names, order and constants of its features."""

_HEAD = "head"
_KEY = re.compile(rb"([0-9a-f]{16}):([0-9a-f]{16}|head)")
_INT64 = 1 << 63
MOST_WRITES = 1 << 53
"""Largest number of a write; a float holds it exactly."""


class StateHead(Message):
    """What a write of states ends with: how far the trainer had counted."""

    number: int = Field(ge=1, le=MOST_WRITES)
    """Running number of the write: the version of the state as a whole."""
    before: int = Field(ge=-_INT64, lt=_INT64)
    """Takes of earlier seconds are counted, others are not; seconds since 1970."""
    left: int = Field(ge=0)
    """Items that changed and come with the next writes; 0 where all records together are the state at `before`."""
    log: str
    """Kafka's id of the topic `behaviours` that was counted."""
    held: bool = False
    """Whether the trainer keeps this state, to compare what servers computed from it: see topic `skew`."""


class ItemState(Message):
    """A record of the compacted topic `item-states`: what the takes of one item left behind, or of all together.

    Keyed by `state_key`. A tombstone means that the item is in the state of one that was never taken: it was deleted,
    or lost its counts to items that were taken since.
    """

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    features: FeatureVersion
    """The feature set that the state is for."""
    state: Base64
    """The counts, little-endian, as `trainer.features.states` lays them out."""
    head: StateHead | None = None
    """Only in the record of all items together, which is the last of each write."""


def state_value(features: str, state: bytes, head: StateHead | None = None) -> bytes:
    """An `ItemState` as the value of a record."""
    return ItemState(features=features, state=base64.b64encode(state), head=head).model_dump_json().encode()


def state_key(features: str, item: int | None) -> bytes:
    """Key of an item's record, by the first hash of its id; of the record of all items together for None."""
    return f"{features}:{_HEAD if item is None else format(item, '016x')}".encode()


def parse_state_key(key: bytes | None) -> tuple[str, int | None]:
    """Feature version and item of a key, as `state_key` takes them; `ValueError` if it is not one."""
    found = _KEY.fullmatch(key or b"")
    item = None if found is None or found[2] == _HEAD.encode() else int(found[2], 16)
    if found is None or (item is not None and not 0 < item < _INT64):  # 0 is padding's hash
        raise ValueError(f"not a key of item-states: {(key or b'')[:100]!r}")
    return found[1].decode(), item
