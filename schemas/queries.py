"""Queries: what users searched for, encoded; a query is named by a hash of its words and its photo."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from schemas.base import Base64, EncoderVersion, Message
from schemas.versions import SchemaVersion

_QUERY_ID = re.compile(r"[0-9a-f]{32}")

QueryId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""32 hex digits over the words and the photo of a query."""


class QueryEmbedding(Message):
    """The vector of a query; a record of the compacted topic `queries`, keyed by `query_key`."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    query: QueryId
    """The query."""
    encoder_version: EncoderVersion
    """The encoder that made `vector`."""
    vector: Base64 | None
    """Unit vector: little-endian float32, base64 in JSON; null for a query that cannot be encoded."""
    dim: int = Field(ge=1, le=8192)
    """Width of the encoder's vectors."""
    reason: str | None = Field(default=None, max_length=2_000)
    """Why it cannot be encoded."""

    @model_validator(mode="after")
    def _width_fits(self) -> Self:
        if self.vector is not None and len(self.vector) != 4 * self.dim:
            raise ValueError(f"vector has {len(self.vector)} bytes, {self.dim} float32 values need {4 * self.dim}")
        return self


def query_words(text: str | None) -> str:
    """The words of a query with single blanks; queries that differ in blanks alone are one."""
    return " ".join((text or "").split())


def query_id(text: str | None, image: bytes | None) -> str | None:
    """The id of a query of words, of a photo, or of both; None where there is neither."""
    words = query_words(text)
    if not words and not image:
        return None
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16)
    digest.update(b"\0")
    digest.update(hashlib.sha256(image).digest() if image else b"")
    return digest.hexdigest()


def query_key(encoder_version: str, query: str) -> bytes:
    """Key of a record of `queries`."""
    return f"{encoder_version}:{query}".encode()


def parse_query_key(key: bytes | None) -> tuple[str, str]:
    """The (encoder version, query) of a key of `queries`; `ValueError` if it is not one."""
    version, separator, query = (key or b"").decode().partition(":")
    if not (version and separator and _QUERY_ID.fullmatch(query)):
        raise ValueError(f"not a key of queries: {(key or b'')[:100]!r}")
    return version, query
