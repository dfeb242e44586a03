"""Requests and responses of the HTTP API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from schemas.base import MAX_ID_CHARACTERS, Base64, ItemId, Message, UserId, UtcTime
from schemas.behaviours import MAX_QUERY_CHARACTERS

MAX_CANDIDATES = 1_000
MAX_NEIGHBOURS = 100
MAX_SIMILAR_QUERIES = 256

QueryUse = Literal["used", "not_in_time", "not_read", "no_encoder"]
"""How a search entered scores: it did; it was not encoded in time; the release was not taught what users search; this
server cannot encode it."""


def _clearly_valid(given: Any) -> bool:
    if type(given) is not list or not 0 < len(given) <= MAX_CANDIDATES:
        return False
    try:
        joined = "".join(given)
    except TypeError:
        return False
    return joined.isprintable() and " " not in joined and all(given) and len(max(given, key=len)) <= MAX_ID_CHARACTERS


def _at_once(given: Any, check_each: ValidatorFunctionWrapHandler) -> list[str]:
    """Accept clearly valid ids with one check: hundreds of single checks cost more than the JSON. All others, and ids
    with a space, get the full validation and its messages.
    """
    checked: list[str] = given if _clearly_valid(given) else check_each(given)
    return checked


class RequestBody(Message):
    """Base of request bodies. Unknown fields are refused: an ignored wish would be answered as if it were granted."""

    model_config = ConfigDict(extra="forbid")


class ScoreRequest(RequestBody):
    """Body of `POST /v1/score`."""

    user_id: UserId
    """The user whose takes are predicted."""
    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES), WrapValidator(_at_once)]
    """Candidates."""
    trigger_item: ItemId | None = None
    """The item that the user is viewing, if any."""
    at: UtcTime | None = None
    """Moment of the request (event time), for logs of the past; now by default."""
    exclude_taken: bool = False
    """Whether to leave out candidates that are among the user's stored takes."""
    query_text: str | None = Field(default=None, max_length=MAX_QUERY_CHARACTERS)
    """The words that the user searches for, if any."""
    query_image: Base64 | None = None
    """The photo that the user searches by (base64), if any."""


class ItemScore(Message):
    """The score of one candidate."""

    item_id: ItemId
    """The candidate."""
    probability: float | None
    """Predicted probability of a take; null if it cannot be scored."""
    has_vector: bool
    """Whether content was used; false for an item without a row in the center."""
    kinds: dict[str, float | None] | None = None
    """Predicted probability of a cart or purchase, and of a purchase, where the release tells them apart; a purchase
    counts as a cart, and both as a take."""
    score: float | None = None
    """The probabilities by MIM_SERVE__KIND_WEIGHTS, where that is set."""


class ScoreResponse(Message):
    """Response of `POST /v1/score`, in the order of the request."""

    scores: list[ItemScore]
    """One per candidate that was not left out."""
    left_out: list[str] = Field(default_factory=list)
    """Candidates that the user took, with `exclude_taken`."""
    release_id: str
    """The model of these scores."""
    weights_sha256: str
    """Checksum of its weights."""
    encoder_version: str
    """The encoder of the vectors used."""
    history_length: int
    """Number of the user's takes that were known."""
    query: QueryUse | None = None
    """How the search entered the scores; null where nothing was searched."""
    kinds_missing: list[str] = Field(default_factory=list)
    """Kinds that MIM_SERVE__KIND_WEIGHTS weighs and the release does not tell apart: no `score` has them."""


class SimilarRequest(RequestBody):
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
    """Number of neighbours."""
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
    """The item of the query; null for a text or a picture."""
    found: bool
    """False if the item of the query is not in the center."""
    neighbours: list[Neighbour]
    """Nearest first."""


class SimilarResponse(Message):
    """Response of `POST /v1/similar`."""

    results: list[SimilarResult]
    """One per query, in order."""
    encoder_version: str
    """The encoder of the vectors compared."""


class ItemView(Message):
    """Response of `GET /v1/items/{id}`: the row in the center."""

    item_id: ItemId
    """The item."""
    encoder_version: str
    """Encoder of its vector."""
    content_hash: str
    """Hash of the content that was encoded."""
    published_at: UtcTime
    """Time of first publication."""
    category: str | None
    """Its category."""
    price: float | None
    """Its current price."""
    has_title: bool
    """Whether the vector includes text."""
    has_image: bool
    """Whether the vector includes a picture."""
    source_partition: int
    """Partition of the row's record in `items`."""
    source_offset: int
    """Offset of that record."""
    vector: list[float] | None = None
    """The vector, if requested with `?vector=1`."""
