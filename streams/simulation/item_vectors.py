"""Vectors of a folder's items as records of `embeddings`, from the cache of tower features."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from encoders.features import ItemFeatures
from schemas.items import ItemEmbedding, SourceOffset
from schemas.queries import QueryEmbedding, query_id
from streams.stores.vectors.item_index import MAX_TITLE_CHARACTERS
from streams.training.vector_records import EmbeddingRecord
from trainer.datasets.exposures import PUBLISHED_AT_IS, how_published
from trainer.datasets.folder import DataSet
from trainer.samples.searches import query_item

_ROWS_PER_PASS = 64
_SOURCE = SourceOffset(partition=0, offset=0)


@runtime_checkable
class FeatureEncoder(Protocol):
    """An encoder whose fusion can be asked alone."""

    @property
    def version(self) -> str:
        """Its `EncoderVersion`."""
        ...

    def vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        """What `encode` makes of items with these features."""
        ...

    def query_vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        """What `encode_queries` makes of searches with these features."""
        ...


def vectors_of(encode: Callable[[ItemFeatures], NDArray[np.float32]], features: ItemFeatures) -> NDArray[np.float32]:
    """The vector of each item or query, (N, dim); zero rows where there is no content, which index workers refuse."""
    usable = np.flatnonzero(features.has_text_N | features.has_image_N)
    parts = np.split(usable, range(_ROWS_PER_PASS, len(usable), _ROWS_PER_PASS))
    made = np.concatenate([encode(features.select(part)) for part in parts])
    vectors_ND = np.zeros((len(features), made.shape[1]), np.float32)
    vectors_ND[usable] = made
    return vectors_ND


def embedding_records(
    data: DataSet,
    vectors_ND: NDArray[np.float32],
    content_hashes: Sequence[str],
    *,
    version: str,
    outcomes: Collection[str] = (),
) -> Iterator[EmbeddingRecord]:
    """A record per item that has a vector, as `mimstream index` announces it. `outcomes` are no attributes."""
    known = how_published(data).tolist()
    records = data.records(0, len(data.item_ids))
    for record, vector, content, how in zip(records, vectors_ND, content_hashes, known, strict=True):
        if vector.any():
            yield EmbeddingRecord(
                record.item_id,
                ItemEmbedding(
                    item_id=record.item_id,
                    encoder_version=version,
                    vector=base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()),
                    dim=len(vector),
                    content_hash=content,
                    published_at=datetime.fromtimestamp(record.publish_ts, UTC),
                    title=record.title[:MAX_TITLE_CHARACTERS],
                    category=record.category,
                    price=record.price,
                    year=record.year,
                    attributes=record.described_without(outcomes),
                    published_at_is=PUBLISHED_AT_IS[how],
                    source=_SOURCE,
                ),
            )


def query_records(
    queries: Sequence[tuple[str | None, bytes | None]], vectors_ND: NDArray[np.float32], *, version: str
) -> Iterator[EmbeddingRecord]:
    """A record per search, of words and photo, as `mimstream index` announces it."""
    for (text, image), vector in zip(queries, vectors_ND, strict=True):
        query = query_id(text, image)
        if query is not None and vector.any():
            encoded = base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes())
            embedding = QueryEmbedding(query=query, encoder_version=version, vector=encoded, dim=len(vector))
            yield EmbeddingRecord(query_item(query), embedding)


VectorsBySecond = Mapping[int, Sequence[EmbeddingRecord]]
"""Event second -> the embeddings that replace earlier ones from then on."""
