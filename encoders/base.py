"""Inputs of encoders, and the protocol of all encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from schemas.attributes import Attribute
from schemas.items import ItemPublished
from schemas.queries import query_words


@dataclass(frozen=True)
class ItemContent:
    """The input of an encoder, independent of time and user."""

    item_id: str = ""
    """Only for error messages; never part of a vector."""
    title: str = ""
    """Title as shown to buyers."""
    text: str = ""
    """Longer description."""
    category: str | None = None
    """Category name or path."""
    price: float | None = None
    """Price at first publish, not the current one."""
    image: bytes | None = None
    """The encoded picture (JPEG, PNG, WebP, GIF or BMP); None where there is none."""
    year: int | None = None
    """Year of release or of the model, where known."""
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    """What else is known of the item at publish time, without outcomes; texts are read, numbers are not."""

    @classmethod
    def of(cls, item: ItemPublished, image: bytes | None) -> Self:
        """The content of a published item with its fetched picture, None if it has none."""
        return cls(
            item_id=item.item_id,
            title=item.title,
            text=item.text,
            category=item.category,
            price=item.price,
            image=image,
            year=item.year,
            attributes=item.attributes,
        )


def query_content(text: str | None, image: bytes | None) -> ItemContent:
    """What an encoder sees of a search, by words, by a photo or by both."""
    return ItemContent(title=query_words(text), image=image)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Opaque result of `Encoder.prepare`: small, immutable by convention, thread-safe."""

    tokens: tuple[int, ...] | None
    """Token ids with the specials of the text tower; None where there is no text."""
    pixels: NDArray[np.uint8] | None
    """(size, size, 3) RGB input of the image tower; None where there is none."""

    category: str | None = None
    """Publish-time attributes, for encoders that use them: category,"""
    year: int | None = None
    """year,"""
    price: float | None = None
    """price at first publish,"""
    words: tuple[int, ...] = ()
    """and hashes of the values of further attributes."""

    @cached_property
    def address(self) -> bytes:
        """Digest of all inputs: equal digests give equal vectors of one encoder."""
        parts: tuple[object, ...] = (self.tokens, None if self.pixels is None else self.pixels.shape)
        parts = (*parts, self.category, self.year, self.price, self.words)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.digest()

    @property
    def has_title(self) -> bool:
        """Whether the vector includes text."""
        return self.tokens is not None

    @property
    def has_image(self) -> bool:
        """Whether the vector includes a picture."""
        return self.pixels is not None


class Encoder(Protocol):
    """Content to unit vectors. Encoders with the same `version` give the same vectors (up to float rounding)."""

    @property
    def version(self) -> str:
        """Content-addressed `EncoderVersion`: changes whenever vectors may change."""
        ...

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        ...

    def prepare(self, content: ItemContent) -> Prepared:
        """Check, decode, resize and tokenise one item. Pure and thread-safe.

        Raises `EncodingFailed` with `BAD_IMAGE`, `IMAGE_TOO_LARGE` or `NO_CONTENT`.
        """
        ...

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows in the order of `batch`.

        A row does not depend on the others: bit-identical on a CPU with one thread per pass, within 1e-5 elsewhere.
        """
        ...

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """The same for what users ask with, words or a photo: rows whose nearest items are the answers."""
        ...
