"""Which vectors the representation center holds, without knowing their encoder beforehand."""

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

    collection: str
    dim: int
    encoder_version: str | None
    """As its rows say; None while it is empty."""

    is_filled: bool
    """Whether it was complete once: everything that its readers had acknowledged by then was in it."""


async def read_center(config: MilvusConfig) -> CollectionInfo | None:
    """Look behind the alias; None if nothing was ever indexed.

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
        collection = str(described["collection_name"])
        filled = _filled(collection) in client.list_aliases(collection).get("aliases", [])
        return CollectionInfo(collection, int(dims[0]), version, filled)

    connection = MilvusConnection(config)
    try:
        return await connection.call_blocking("a look behind the alias", look)
    finally:
        await connection.close()


async def mark_filled(config: MilvusConfig, center: CollectionInfo) -> None:
    """Note in Milvus itself that a center is complete: whoever loses its rows loses the note with them.

    The note is an alias, which every kind of Milvus keeps with the collection.
    """

    def note(client: MilvusClient) -> None:
        try:
            client.create_alias(center.collection, _filled(center.collection))
        except MilvusException:  # another worker was first
            if _filled(center.collection) not in client.list_aliases(center.collection).get("aliases", []):
                raise

    connection = MilvusConnection(config)
    try:
        await connection.call_blocking("a note on the center", note)
    finally:
        await connection.close()


def _filled(collection: str) -> str:
    return f"{collection}_filled"
