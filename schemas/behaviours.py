"""Behaviours: what users were shown and what they took."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from schemas.base import Base64, EventId, ItemId, Message, UserId, UtcTime
from schemas.versions import SchemaVersion


class BehaviourKind(StrEnum):
    """What happened. An impression is an exposure; the others are takes of rising reliability."""

    EXPOSURE = "exposure"
    CLICK = "click"
    CART = "cart"
    PURCHASE = "purchase"

    @property
    def is_take(self) -> bool:
        """Whether the user did something with the item rather than only being shown it."""
        return self is not BehaviourKind.EXPOSURE


class Behaviour(Message):
    """One event of the click log; a record of `behaviours`, keyed by `user_id`."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    event_id: EventId
    """Unique for ever; a second event with the same id is a duplicate and changes nothing."""
    kind: BehaviourKind
    """What happened."""
    user_id: UserId
    """Who; must equal the record's key."""
    item_id: ItemId
    """With which item."""
    occurred_at: UtcTime
    """When it happened (event time)."""
    exposure_id: EventId | None = None
    """For a take: the `event_id` of the exposure that it answers, where the platform knows it."""
    query_text: str | None = Field(default=None, max_length=1_000)
    """The search that led here."""
    query_image: Base64 | None = None
    """The photo that was searched with, base64 in JSON."""
    trigger_item: ItemId | None = None
    """The item that was being looked at just before."""
    defines_publish: bool = False
    """Set where the item's `published_at` was inferred from this very behaviour, so that its age here says nothing."""
