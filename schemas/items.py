"""Items: the messages of a shop, and their rows in the representation center."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from schemas.attributes import Attributes, PublishedAtIs, words_of
from schemas.base import Base64, EncoderVersion, ItemId, Message, Price, UtcTime, is_identifier
from schemas.versions import SchemaVersion

TEXT_BYTES = 400_000
"""Room that the fields of an item take beside its picture: all at their longest, escaped in JSON."""


def largest_picture(record_bytes: int) -> int:
    """Bytes of the largest picture that a record of `record_bytes` has room for, as base64 beside the longest texts."""
    return max(0, (record_bytes - TEXT_BYTES) // 4 * 3)


def record_bytes_for(picture_bytes: int) -> int:
    """Bytes of a record with room for a picture of `picture_bytes` beside the longest texts."""
    return 4 * -(-picture_bytes // 3) + TEXT_BYTES


class ItemPublished(Message):
    """The whole current item; a record of the compacted topic `items`, keyed by `item_id`.

    A publish and an update look the same: each contains everything, because compaction keeps only the last record of
    a key. A delete is a tombstone (a null value under the same key).
    """

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    item_id: ItemId
    """The item; must equal the record's key."""
    event: Literal["publish", "update"] = "publish"
    """Informative; both are handled alike."""
    title: str = Field(default="", max_length=2_000)
    """Title as shown to buyers."""
    text: str = Field(default="", max_length=20_000)
    """Longer description; encoded together with the title."""
    category: str | None = Field(default=None, max_length=200)
    """Category name or path."""
    price: Price | None = None
    """Current price, in the shop's unit. A change of price alone does not change the vector."""
    year: int | None = Field(default=None, ge=0, le=9999)
    """Year of release or of the model, where known; read by some encoders."""
    image: Base64 | None = None
    """The encoded picture itself (JPEG, PNG, WebP, GIF or BMP), base64 in JSON."""
    image_url: str | None = Field(default=None, max_length=2_000)
    """URL of the picture if `image` is absent. The same URL means the same picture."""
    attributes: Attributes = Field(default_factory=dict)
    """What else is known of the item, by name: a text, a list of texts or a number. Nothing that is an outcome, such as
    ratings or sales: the click model would learn from what nobody knew when the item was shown."""
    published_at: UtcTime
    """Time of first publication (event time); an update repeats it."""
    published_at_is: PublishedAtIs = "known"
    """Whether `published_at` is the platform's, was inferred from the item's first take, or is not known."""
    updated_at: UtcTime | None = None
    """Time of this version of the item (event time)."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not (self.title.strip() or self.text.strip() or self.image or self.image_url):
            raise PydanticCustomError("no_content", "an item needs a title, a text or a picture")
        return self

    def without(self, attributes: Container[str]) -> Self:
        """The item without the attributes of these names."""
        kept = {name: value for name, value in self.attributes.items() if name not in attributes}
        return self if len(kept) == len(self.attributes) else self.model_copy(update={"attributes": kept})

    def content_hash(self) -> str:
        """32 hex digits over the inputs of encoders: title, text, category, picture, year, words of attributes."""
        picture = hashlib.sha256(self.image).hexdigest() if self.image else self.image_url
        parts: list[object] = [self.title, self.text, self.category, picture]
        if self.year is not None:  # hashes of items without a year are those of releases before years
            parts.append(self.year)
        if words := words_of(self.attributes):
            parts.append([list(word) for word in words])
        content = json.dumps(parts, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class SourceOffset(Message):
    """The record of `items` that a row is made from; identifies replayed writes."""

    partition: int = Field(ge=0)
    """Partition of `items`."""
    offset: int = Field(ge=0)
    """Offset of the record in that partition."""


class ItemEmbedding(Message):
    """An item's row in the representation center; a record of the compacted topic `embeddings`.

    Keyed by `embedding_key(encoder_version, item_id)`; a tombstone under that key means that the row was deleted.
    """

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    item_id: ItemId
    """The item."""
    encoder_version: EncoderVersion
    """The encoder that made `vector`."""
    vector: Base64
    """Unit vector: little-endian float32, base64 in JSON."""
    dim: int = Field(ge=1, le=8192)
    """Width of `vector`."""
    content_hash: str
    """`ItemPublished.content_hash()` of the version that was encoded."""
    published_at: UtcTime
    """Time of first publication (event time)."""
    title: str = Field(default="", max_length=2_000)
    """Title, cut to 500 characters; empty in a record of an earlier build."""
    category: str | None = None
    """Category at the time of writing."""
    price: Price | None = None
    """Price at first publish."""
    year: int | None = None
    """Year of release or of the model."""
    attributes: Attributes = Field(default_factory=dict)
    """`ItemPublished.attributes`."""
    published_at_is: PublishedAtIs = "known"
    """`ItemPublished.published_at_is`."""
    has_title: bool = True
    """Whether the vector includes text."""
    has_image: bool = True
    """Whether the vector includes a picture."""
    source: SourceOffset
    """The record of `items` that this row comes from."""

    @model_validator(mode="after")
    def _width_fits(self) -> Self:
        if len(self.vector) != 4 * self.dim:
            raise ValueError(f"vector has {len(self.vector)} bytes, {self.dim} float32 values need {4 * self.dim}")
        return self


class ImageRetry(Message):
    """An item whose picture could not be fetched yet; a record of `items-retry`, keyed by `item_id`.

    The retry writes only if the center still has the version at `source`: a newer one, or a delete, wins.
    """

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    item: ItemPublished
    """The item as it was published."""
    source: SourceOffset
    """The record of `items`."""
    attempt: int = Field(ge=1)
    """Number of failed fetches so far."""
    not_before: UtcTime
    """Time of the next attempt (wall clock)."""
    requeued_from: str | None = None
    """The dead letter from which the item was requeued, if it was."""
    failed_before: int = Field(default=0, ge=0)
    """Attempts before the requeue."""
    first_failed_at: UtcTime | None = None
    """Time of the first failure before the requeue."""


def embedding_key(encoder_version: str, item_id: str) -> bytes:
    """Key of a record of `embeddings`. A version never contains a colon, so the first one separates."""
    return f"{encoder_version}:{item_id}".encode()


def parse_embedding_key(key: bytes | None) -> tuple[str, str]:
    """The (encoder version, item id) of a key of `embeddings`; `ValueError` if it is not one."""
    version, separator, item_id = (key or b"").decode().partition(":")
    if not (version and separator and is_identifier(item_id)):
        raise ValueError(f"not a key of embeddings: {key!r}")
    return version, item_id
