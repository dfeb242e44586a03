"""Behaviours: exposures and takes. A take is a click, cart or purchase."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from schemas.base import Base64, EventId, ItemId, Message, Price, UserId, UtcTime
from schemas.versions import SchemaVersion

MAX_QUERY_CHARACTERS = 1_000
"""Characters of a search."""
MAX_PIECES = 1_000_000
MAX_VALUE = 1e12
"""What a take counts as at most."""


class BehaviourKind(StrEnum):
    """The kind of a behaviour: an exposure (impression), or a take, in order of rising reliability."""

    EXPOSURE = "exposure"
    CLICK = "click"
    CART = "cart"
    PURCHASE = "purchase"

    @property
    def is_take(self) -> bool:
        """Whether this is a click, cart or purchase."""
        return self is not BehaviourKind.EXPOSURE


class Behaviour(Message):
    """One event of the click log; a record of `behaviours`, keyed by `user_id`."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    event_id: EventId
    """Unique over all time; a second event with the same id is a duplicate and is ignored."""
    kind: BehaviourKind
    """Exposure, click, cart or purchase."""
    user_id: UserId
    """The user; must equal the record's key."""
    item_id: ItemId
    """The item."""
    occurred_at: UtcTime
    """Event time."""
    exposure_id: EventId | None = None
    """For a take: the `event_id` of its exposure, where the platform has it."""
    query_text: str | None = Field(default=None, max_length=MAX_QUERY_CHARACTERS)
    """The search that led here."""
    query_image: Base64 | None = None
    """The photo of the search that led here, base64 in JSON."""
    trigger_item: ItemId | None = None
    """The item viewed just before."""
    price: Price | None = None
    """For a take: what one piece costs."""
    qty: int | None = Field(default=None, ge=1, le=MAX_PIECES)
    """For a take: how many pieces; 1 where it does not say."""
    defines_publish: bool = False
    """Whether the item's `published_at` was inferred from this behaviour, so that its age here is unknown."""
    drawn_from: EventId | None = None
    """For an exposure that was drawn from others' takes and not shown: the `event_id` of the take that it was drawn
    from. Features of the exposure do not count that take."""
    drawn_at: UtcTime | None = None
    """Event time of that take."""

    @property
    def value(self) -> float:
        """What the take is worth: its price times its pieces; 0 where it does not say."""
        return min((self.price or 0.0) * (self.qty or 1), MAX_VALUE)

    @model_validator(mode="after")
    def _source_has_a_time(self) -> Self:
        if (self.drawn_from is None) != (self.drawn_at is None):
            raise ValueError("drawn_from and drawn_at come together")
        return self
