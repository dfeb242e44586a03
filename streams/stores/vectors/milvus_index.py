"""The item index in Milvus: one collection per encoder version, behind an alias."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from pymilvus import AsyncMilvusClient, DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from typing_extensions import override

from schemas.base import MAX_ID_CHARACTERS
from schemas.errors import Misconfigured
from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.item_index import MAX_TITLE_CHARACTERS, ItemIndex, ItemRow, check_rows, last_of_each

log = structlog.get_logger()

_UTF8_BYTES = 4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_PRICE = -1.0  # prices are never negative; old servers have no null

_FACTS = "facts"
"""Year, attributes and how the time of publication is known, as JSON. A collection of an earlier build has no such
field; its rows are without them until the encoder changes."""

_ID_TEXT = {"datatype": DataType.VARCHAR, "max_length": MAX_ID_CHARACTERS * _UTF8_BYTES}
_FIELDS: dict[str, dict[str, Any]] = {
    "item_id": {**_ID_TEXT, "is_primary": True},
    "emb": {"datatype": DataType.FLOAT_VECTOR},
    "searchable": {"datatype": DataType.BOOL},
    "encoder_version": {"datatype": DataType.VARCHAR, "max_length": 64},
    "content_hash": {"datatype": DataType.VARCHAR, "max_length": 64},
    "published_at_us": {"datatype": DataType.INT64},
    "category": _ID_TEXT,
    "price": {"datatype": DataType.DOUBLE},
    "first_price": {"datatype": DataType.DOUBLE},
    "has_title": {"datatype": DataType.BOOL},
    "has_image": {"datatype": DataType.BOOL},
    "source_partition": {"datatype": DataType.INT64},
    "source_offset": {"datatype": DataType.INT64},
    "produced_at_ms": {"datatype": DataType.INT64},
    "title": {"datatype": DataType.VARCHAR, "max_length": MAX_TITLE_CHARACTERS * _UTF8_BYTES},
    _FACTS: {"datatype": DataType.VARCHAR, "max_length": 65_535},
}
"""Fields of a collection; `emb` has the encoder's `dim` besides."""


def collection_name(alias: str, encoder_version: str) -> str:
    """Name of the collection that holds one encoder version's vectors.

    Collection names allow fewer characters than versions, so a short hash keeps two versions apart that only differ
    in those.
    """
    plain = re.sub(r"[^A-Za-z0-9]", "_", encoder_version)
    return f"{alias}__{plain}_{hashlib.sha256(encoder_version.encode()).hexdigest()[:6]}"


def is_generation(collection: str, alias: str) -> bool:
    """Whether a collection is one that some encoder version has, or had, behind this alias."""
    return re.fullmatch(rf"{re.escape(alias)}__[A-Za-z0-9_]+_[0-9a-f]{{6}}", collection) is not None


class MilvusItemIndex(ItemIndex):
    """The index in Milvus: one collection per encoder version, behind an alias.

    One write is in flight at a time: with more, the embedded server loses acknowledged rows when it is killed.
    """

    def __init__(self, config: MilvusConfig, *, encoder_version: str, dim: int) -> None:
        self._config = config
        self._encoder_version = encoder_version
        self._dim = dim
        self._milvus = MilvusConnection(config)
        self._writing = asyncio.Lock()
        self._fields: list[str] | None = None
        """Fields to read, once the collection was asked for its own."""

    @override
    async def open(self) -> None:
        """Create the collection and the alias if they are missing; refuse the alias of another encoder's collection.

        Raises `Misconfigured` or `StoreUnavailable`.
        """
        await self._milvus.call_blocking("setting up the collection", self._set_up)

    @override
    async def close(self) -> None:
        await self._milvus.close()

    @override
    async def upsert(self, rows: Sequence[ItemRow]) -> None:
        if not rows:
            return
        check_rows(rows, encoder_version=self._encoder_version, dim=self._dim)
        data = [to_milvus(row) for row in last_of_each(rows)]  # servers keep both rows of two equal ids
        async with self._writing:
            await self._milvus.call(f"an upsert of {len(data)} rows", partial(self._upsert, data))

    async def _upsert(self, data: list[dict[str, Any]], client: AsyncMilvusClient) -> None:
        if _FACTS not in await self._read_fields(client):
            data = [{name: value for name, value in entity.items() if name != _FACTS} for entity in data]
        await client.upsert(self._config.alias, data, timeout=self._config.timeout_seconds)

    async def _read_fields(self, client: AsyncMilvusClient) -> list[str]:
        if self._fields is None:
            found = await client.describe_collection(self._config.alias, timeout=self._config.timeout_seconds)
            held = {field["name"] for field in found["fields"]}
            if _FACTS not in held:
                log.warning(
                    "milvus.no_facts",
                    collection=found.get("collection_name", self._config.alias),
                    help="made by an earlier build: years and attributes of items are not kept, so features lack them; "
                    "set MIM_MILVUS__ALIAS to a new name to index into a new one",
                )
            self._fields = [field for field in _FIELDS if field != "searchable" and (field != _FACTS or field in held)]
        return self._fields

    @override
    async def delete(self, item_ids: Sequence[str]) -> None:
        """Remove rows by id, also from collections of other encoders under the same alias."""
        if not item_ids:
            return
        async with self._writing:
            await self._milvus.call(f"a delete of {len(item_ids)} rows", partial(self._delete, item_ids))

    async def _delete(self, item_ids: Sequence[str], client: AsyncMilvusClient) -> None:
        alias, timeout = self._config.alias, self._config.timeout_seconds
        await client.delete(alias, filter=_among(item_ids), timeout=timeout)
        own = collection_name(alias, self._encoder_version)
        names = [name for name in await client.list_collections(timeout=timeout) if is_generation(name, alias)]
        if names in ([], [own]):
            return
        # of aliases `a` and `a__b`, names of the second look like those of the first
        others: list[str] = []
        for name in names:
            found = await client.list_aliases(name, timeout=timeout)
            others += [f"{one}__" for one in found if one.startswith(f"{alias}__")]
        for name in names:
            if name != own and not name.startswith(tuple(others)):
                await client.delete(name, filter=_among(item_ids), timeout=timeout)

    @override
    async def fetch(self, item_ids: Sequence[str], *, pending: bool = False, fresh: bool = True) -> dict[str, ItemRow]:
        if not item_ids:
            return {}

        async def read(client: AsyncMilvusClient) -> list[dict[str, Any]]:
            entities: list[dict[str, Any]] = await client.query(
                self._config.alias,
                filter=_among(item_ids),
                output_fields=await self._read_fields(client),
                consistency_level="Strong" if fresh else self._config.consistency_level,
                timeout=self._config.timeout_seconds,
            )
            return entities

        found = await self._milvus.call(f"a read of {len(item_ids)} rows", read)
        rows = [from_milvus(entity) for entity in found]
        return {row.item_id: row for row in rows if pending or row.is_searchable}

    @override
    async def forget_deleted(self, before: datetime) -> None:
        moment = (before - _EPOCH) // timedelta(microseconds=1)
        async with self._writing:
            await self._milvus.call(
                "a removal of marks of deleted items",
                lambda client: client.delete(
                    self._config.alias,
                    filter=f'content_hash == "" and published_at_us < {moment}',
                    timeout=self._config.timeout_seconds,
                ),
            )

    @override
    async def search(self, vectors: NDArray[np.float32], k: int) -> list[list[tuple[str, float]]]:
        if not len(vectors):
            return []
        found = await self._milvus.call(
            f"a search of {len(vectors)} vectors",
            lambda client: client.search(
                self._config.alias,
                data=list(np.ascontiguousarray(vectors, dtype=np.float32)),
                anns_field="emb",
                filter="searchable == true",
                limit=k,
                output_fields=["item_id"],
                search_params={"metric_type": "IP", "params": {"ef": max(128, k)}},
                consistency_level=self._config.consistency_level,
                timeout=self._config.timeout_seconds,
            ),
        )
        return [[(str(hit["item_id"]), float(hit["distance"])) for hit in hits] for hits in found]

    @override
    async def count(self) -> int:
        found = await self._milvus.call(
            "a count",
            lambda client: client.query(
                self._config.alias,
                filter="searchable == true",
                output_fields=["count(*)"],
                consistency_level="Strong",
                timeout=self._config.timeout_seconds,
            ),
        )
        return int(found[0]["count(*)"])

    def _set_up(self, client: MilvusClient) -> None:
        alias, wanted = self._config.alias, collection_name(self._config.alias, self._encoder_version)
        current = _alias_target(client, alias)
        if current is not None and current != wanted:
            raise Misconfigured(
                f"Milvus alias {alias!r} points at collection {current!r}, which holds another encoder's vectors than "
                f"{self._encoder_version!r}: set MIM_ENCODER__BUNDLE to the encoder that made them, or "
                "MIM_MILVUS__ALIAS to a new name to build a second center from the topic"
            )
        # each step checks again when it fails: several workers may set up at once, and one may have died half-way
        _ensure(lambda: client.has_collection(wanted), lambda: self._create(client, wanted))
        _ensure(lambda: bool(client.list_indexes(wanted)), lambda: _create_vector_index(client, wanted))
        _ensure(lambda: _alias_target(client, alias) == wanted, lambda: client.create_alias(wanted, alias))
        client.load_collection(wanted)

    def _create(self, client: MilvusClient, name: str) -> None:
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=self._encoder_version)
        for field, options in _FIELDS.items():
            schema.add_field(field, **options, **({"dim": self._dim} if field == "emb" else {}))
        client.create_collection(name, schema=schema, consistency_level="Strong")


def _ensure(done: Callable[[], bool], step: Callable[[], object]) -> None:
    if done():
        return
    try:
        step()
    except MilvusException:
        if not done():
            raise


def _create_vector_index(client: MilvusClient, name: str) -> None:
    index = client.prepare_index_params()
    index.add_index("emb", index_type="HNSW", metric_type="IP", params={"M": 16, "efConstruction": 200})
    client.create_index(name, index)


def _alias_target(client: MilvusClient, alias: str) -> str | None:
    for name in client.list_collections():
        if alias in client.list_aliases(name).get("aliases", []):
            return str(name)
    return None


def _among(item_ids: Sequence[str]) -> str:
    # the client's own `get` does not escape ids
    return f"item_id in {json.dumps(list(dict.fromkeys(item_ids)), ensure_ascii=False)}"


def to_milvus(row: ItemRow) -> dict[str, Any]:
    """The entity of a row, as the client takes it."""
    return {
        "item_id": row.item_id,
        "emb": np.ascontiguousarray(row.vector, dtype=np.float32),
        "searchable": row.is_searchable,
        "encoder_version": row.encoder_version,
        "content_hash": row.content_hash,
        "published_at_us": (row.published_at - _EPOCH) // timedelta(microseconds=1),
        "category": row.category or "",
        "price": _NO_PRICE if row.price is None else row.price,
        "first_price": _NO_PRICE if row.first_price is None else row.first_price,
        "has_title": row.has_title,
        "has_image": row.has_image,
        "source_partition": row.source_partition,
        "source_offset": row.source_offset,
        "produced_at_ms": row.produced_at_ms,
        "title": row.title[:MAX_TITLE_CHARACTERS],
        _FACTS: _facts_text(row),
    }


def _facts_text(row: ItemRow) -> str:
    facts = {"year": row.year, "attributes": dict(row.attributes), "published_at_is": row.published_at_is}
    return json.dumps(facts, ensure_ascii=False) if facts != _NO_FACTS else ""


_NO_FACTS: dict[str, Any] = {"year": None, "attributes": {}, "published_at_is": "known"}


def from_milvus(entity: dict[str, Any]) -> ItemRow:
    """The row of an entity with all fields."""
    return ItemRow(
        item_id=str(entity["item_id"]),
        encoder_version=str(entity["encoder_version"]),
        vector=np.asarray(entity["emb"], dtype=np.float32),
        content_hash=str(entity["content_hash"]),
        published_at=_EPOCH + timedelta(microseconds=int(entity["published_at_us"])),
        category=str(entity["category"]) or None,
        price=None if entity["price"] == _NO_PRICE else float(entity["price"]),
        first_price=None if entity["first_price"] == _NO_PRICE else float(entity["first_price"]),
        has_title=bool(entity["has_title"]),
        has_image=bool(entity["has_image"]),
        source_partition=int(entity["source_partition"]),
        source_offset=int(entity["source_offset"]),
        produced_at_ms=int(entity["produced_at_ms"]),
        title=str(entity["title"]),
        **json.loads(entity.get(_FACTS) or "{}"),
        keeps_facts=_FACTS in entity,
    )
