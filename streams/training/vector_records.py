"""Records of `embeddings` and `queries` to what the trainer is given of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from schemas.base import decode, produced_at
from schemas.errors import BadMessage
from schemas.items import ItemEmbedding, parse_embedding_key
from schemas.queries import QueryEmbedding, parse_query_key
from streams.stores.vectors.item_index import UNIT_TOLERANCE
from trainer.samples.searches import query_item

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EmbeddingRecord:
    """One readable record of `embeddings` or `queries`; a query is named as `query_item` does.

    `embedding` is None for a tombstone, and for a query that cannot be encoded.
    """

    item_id: str
    embedding: ItemEmbedding | QueryEmbedding | None


class VectorRecords:
    """Decodes what is fetched of both topics, and keeps it until it is handed out.

    Vectors of one encoder count: that of `encoder_version`, or else of the first embedding read. Queries name none, so
    those that come before it wait.
    """

    def __init__(self, encoder_version: str | None, *, max_bytes: int) -> None:
        self.encoder_version = encoder_version
        self._max_bytes = max_bytes
        self._fetched: list[EmbeddingRecord] = []
        self._early: list[Any] = []
        self.broken = self.other_encoders = 0

    def __bool__(self) -> bool:
        return bool(self._fetched)

    def pop(self) -> list[EmbeddingRecord]:
        """What was added since the last call, oldest first."""
        fetched, self._fetched = self._fetched, []
        return fetched

    def add_embeddings(self, records: Iterable[Any]) -> None:
        """Add records of `embeddings`."""
        for record in records:
            try:
                version, item_id = parse_embedding_key(record.key)
                if self.encoder_version is None and record.value is not None:
                    self._embedding(record, version, item_id)  # a broken record names no encoder
                    self.encoder_version = version
                if self._is_ours(version):
                    self._fetched.append(EmbeddingRecord(item_id, self._embedding(record, version, item_id)))
            except (ValueError, BadMessage) as error:
                self._count_broken("embeddings", record, error)
        if self._early and self.encoder_version is not None:
            early, self._early = self._early, []
            self.add_queries(early)

    def add_queries(self, records: Iterable[Any]) -> None:
        """Add records of `queries`."""
        if self.encoder_version is None:
            self._early += records
            return
        for record in records:
            try:
                version, query = parse_query_key(record.key)
                if self._is_ours(version):
                    self._fetched.append(EmbeddingRecord(query_item(query), self._query(record, version, query)))
            except (ValueError, BadMessage) as error:
                self._count_broken("queries", record, error)

    def _is_ours(self, version: str) -> bool:
        if version == self.encoder_version:
            return True
        self.other_encoders += 1
        if self.other_encoders == 1:
            log.warning("train.other_encoder_ignored", ignored=version, used=self.encoder_version)
        return False

    def _count_broken(self, topic: str, record: Any, error: Exception) -> None:
        self.broken += 1
        log.warning(
            "train.broken_vector", topic=topic, partition=record.partition, offset=record.offset, error=str(error)
        )

    def _embedding(self, record: Any, version: str, item_id: str) -> ItemEmbedding | None:
        if record.value is None:
            return None
        now = produced_at(record.timestamp)
        embedding = decode(ItemEmbedding, record.value, now=now, max_bytes=self._max_bytes)
        if (embedding.encoder_version, embedding.item_id) != (version, item_id):
            raise ValueError(f"key {record.key!r} does not belong to item {embedding.item_id!r}")
        _check_length(embedding.vector, f"item {item_id!r}")
        return embedding

    def _query(self, record: Any, version: str, query: str) -> QueryEmbedding | None:
        if record.value is None:
            return None
        now = produced_at(record.timestamp)
        embedding = decode(QueryEmbedding, record.value, now=now, max_bytes=self._max_bytes)
        if (embedding.encoder_version, embedding.query) != (version, query):
            raise ValueError(f"key {record.key!r} does not belong to query {embedding.query!r}")
        if embedding.vector is None:
            return None
        _check_length(embedding.vector, f"query {query!r}")
        return embedding


def _check_length(vector: bytes, of: str) -> None:
    length = np.linalg.norm(np.frombuffer(vector, "<f4").astype(np.float64))
    if not abs(length - 1.0) <= UNIT_TOLERANCE:  # also true for NaN
        raise ValueError(f"vector of {of} has the length {length}, not 1")
