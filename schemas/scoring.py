"""Requests and answers of the HTTP API."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from schemas.base import MAX_ID_CHARACTERS, Base64, ItemId, Message, UserId, UtcTime

MAX_CANDIDATES = 1_000
MAX_NEIGHBOURS = 100
MAX_SIMILAR_QUERIES = 256


def _plainly_right(given: Any) -> bool:
    if type(given) is not list or not 0 < len(given) <= MAX_CANDIDATES:
        return False
    try:
        together = "".join(given)
    except TypeError:
        return False
    return (
        together.isprintable() and " " not in together and all(given) and len(max(given, key=len)) <= MAX_ID_CHARACTERS
    )


def _at_once(given: Any, check_each: ValidatorFunctionWrapHandler) -> list[str]:
    """Pass ids that are plainly right in one go: checking hundreds one by one costs more than their JSON. Whatever is
    not, or has a space, gets the full check, and its messages.
    """
    checked: list[str] = given if _plainly_right(given) else check_each(given)
    return checked


class ScoreRequest(Message):
    """Body of `POST /v1/score`."""

    user_id: UserId
    """Whose interest."""
    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES), WrapValidator(_at_once)]
    """Candidates."""
    query_text: str | None = Field(default=None, max_length=1_000)
    """What the user searches for, if anything."""
    trigger_item: ItemId | None = None
    """What the user is looking at, if anything."""


class ItemScore(Message):
    """One candidate's answer."""

    item_id: ItemId
    """The candidate."""
    probability: float | None
    """Predicted probability that the user takes it; null if it cannot be scored."""
    has_vector: bool
    """Whether content took part; false for an item that the center does not hold."""


class ScoreResponse(Message):
    """Answer of `POST /v1/score`, in the order of the request."""

    scores: list[ItemScore]
    """One per candidate."""
    release_id: str
    """The model that answered."""
    weights_sha256: str
    """Checksum of its weights."""
    encoder_version: str
    """The vectors that took part."""
    history_length: int
    """How many of the user's takes were known."""


class SimilarRequest(Message):
    """Body of `POST /v1/similar`: exactly one of the four kinds of query."""

    item_id: ItemId | None = None
    """Neighbours of this item."""
    item_ids: list[ItemId] | None = Field(default=None, min_length=1, max_length=MAX_SIMILAR_QUERIES)
    """Neighbours of each of these items, in one round trip."""
    text: str | None = Field(default=None, min_length=1, max_length=2_000)
    """Neighbours of this text."""
    image: Base64 | None = None
    """Neighbours of this picture (base64)."""
    k: int = Field(default=10, ge=1, le=MAX_NEIGHBOURS)
    """How many neighbours."""
    include_self: bool = False
    """Whether an item may be its own neighbour."""

    @model_validator(mode="after")
    def _one_query(self) -> Self:
        given = [name for name in ("item_id", "item_ids", "text", "image") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of item_id, item_ids, text, image (given: {given or 'none'})")
        return self


class Neighbour(Message):
    """One item near a query."""

    item_id: ItemId
    """The neighbour."""
    similarity: float
    """Cosine, in [-1, 1]."""


class SimilarResult(Message):
    """Neighbours of one query."""

    query: str | None
    """The item asked about; null for a text or a picture."""
    found: bool
    """False if the item asked about is not in the center."""
    neighbours: list[Neighbour]
    """Nearest first."""


class SimilarResponse(Message):
    """Answer of `POST /v1/similar`."""

    results: list[SimilarResult]
    """One per query, in order."""
    encoder_version: str
    """The vectors that were compared."""


class ItemView(Message):
    """Answer of `GET /v1/items/{id}`: what the center holds."""

    item_id: ItemId
    """The item."""
    encoder_version: str
    """Encoder of its vector."""
    content_hash: str
    """Hash of the content that was encoded."""
    published_at: UtcTime
    """When the item first went on sale."""
    category: str | None
    """Its category."""
    price: float | None
    """Its price now."""
    has_title: bool
    """Whether text took part in the vector."""
    has_image: bool
    """Whether a picture took part in the vector."""
    source_partition: int
    """Partition of `items` that the row comes from."""
    source_offset: int
    """Offset of that record."""
    vector: list[float] | None = None
    """The vector itself, if asked for with `?vector=1`."""
