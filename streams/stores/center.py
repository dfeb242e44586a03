"""Which vectors the representation center holds, without knowing their encoder beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from schemas.errors import Misconfigured
from streams.stores.milvus_client import MilvusConnection
from streams.stores.milvus_config import MilvusConfig

_NO_SUCH_COLLECTION = 100


@dataclass(frozen=True, slots=True)
class CenterIdentity:
    """The collection behind the alias."""

    collection: str
    dim: int
    encoder_version: str | None
    """As its rows say; None while it is empty."""


async def read_center(config: MilvusConfig) -> CenterIdentity | None:
    """Look behind the alias; None if nothing was ever indexed.

    Raises `StoreUnavailable` if Milvus does not answer, `Misconfigured` if the alias is not ours.
    """

    def look(client: MilvusClient) -> CenterIdentity | None:
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
        return CenterIdentity(str(described["collection_name"]), int(dims[0]), version)

    connection = MilvusConnection(config)
    try:
        return await connection.call_blocking("a look behind the alias", look)
    finally:
        await connection.close()
