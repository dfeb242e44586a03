"""The collection of the representation center: which encoder its vectors are from, and whether it is complete."""

from __future__ import annotations

from dataclasses import dataclass

from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from schemas.errors import Misconfigured
from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.config import MilvusConfig

_NO_SUCH_COLLECTION = 100


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """The collection behind the alias."""

    name: str
    dim: int
    """Width of its vectors."""
    encoder_version: str | None
    """Encoder version of its rows; None while it is empty."""
    is_filled: bool
    """Whether it was complete once: it had everything that the index workers had acknowledged by then."""


async def read_center(config: MilvusConfig) -> CollectionInfo | None:
    """Describe the collection behind the alias; None if nothing was ever indexed.

    Raises `StoreUnavailable` if Milvus does not answer, `Misconfigured` if the alias is not ours.
    """

    def look(client: MilvusClient) -> CollectionInfo | None:
        try:
            described = client.describe_collection(config.alias)
        except MilvusException as error:
            if error.code == _NO_SUCH_COLLECTION:
                return None
            raise
        dims = [field["params"]["dim"] for field in described["fields"] if field["name"] == "emb"]
        if not dims:
            raise Misconfigured(
                f"Milvus collection {described['collection_name']!r} behind alias {config.alias!r} has no field 'emb': "
                "it is not a representation center; set MIM_MILVUS__ALIAS to another name"
            )
        client.load_collection(config.alias)
        rows = client.query(
            config.alias,
            filter='item_id != ""',
            output_fields=["encoder_version"],
            limit=1,
            consistency_level="Strong",
            timeout=config.timeout_seconds,
        )
        version = str(rows[0]["encoder_version"]) if rows else None
        name = str(described["collection_name"])
        return CollectionInfo(name, int(dims[0]), version, is_filled=_is_filled(client, name))

    connection = MilvusConnection(config)
    try:
        return await connection.call_blocking("a look behind the alias", look)
    finally:
        await connection.close()


async def mark_filled(config: MilvusConfig, collection: CollectionInfo) -> None:
    """Mark a collection as complete in Milvus itself, so that the mark is lost whenever the rows are.

    The mark is an alias, which every kind of Milvus keeps with the collection.
    """

    def mark(client: MilvusClient) -> None:
        try:
            client.create_alias(collection.name, _filled_alias(collection.name))
        except MilvusException:  # another worker was first
            if not _is_filled(client, collection.name):
                raise

    connection = MilvusConnection(config)
    try:
        await connection.call_blocking("a note on the center", mark)
    finally:
        await connection.close()


def _filled_alias(collection: str) -> str:
    return f"{collection}_filled"


def _is_filled(client: MilvusClient, collection: str) -> bool:
    return _filled_alias(collection) in client.list_aliases(collection).get("aliases", [])
