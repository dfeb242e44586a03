"""Vectors of a folder's items as records of `embeddings`, from the cache of tower features."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from encoders.features import ItemFeatures
from schemas.items import ItemEmbedding, SourceOffset
from streams.training.input import EmbeddingRecord
from trainer.datasets.exposures import PUBLISHED_AT_IS, how_published
from trainer.datasets.folder import DataSet

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


def vectors_of(encoder: FeatureEncoder, features: ItemFeatures) -> NDArray[np.float32]:
    """The vector of each item, (N, dim); zero rows for items without any content, which the index worker refuses."""
    usable = np.flatnonzero(features.has_text_N | features.has_image_N)
    parts = np.split(usable, range(_ROWS_PER_PASS, len(usable), _ROWS_PER_PASS))
    made = np.concatenate([encoder.vectors(features.select(part)) for part in parts])
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
                    category=record.category,
                    price=record.price,
                    year=record.year,
                    attributes=record.described_without(outcomes),
                    published_at_is=PUBLISHED_AT_IS[how],
                    source=_SOURCE,
                ),
            )


VectorsBySecond = Mapping[int, Sequence[EmbeddingRecord]]
"""Event second -> the embeddings that replace earlier ones from then on."""
