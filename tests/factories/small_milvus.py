"""As much of Milvus as the center uses, in this process: collections with aliases, and the filters it is asked with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pymilvus.exceptions import MilvusException

from streams.stores.vectors import client

Rows = dict[str, dict[str, Any]]


class SmallMilvus:
    """The data of a server; `answers` of a kind of call, if there are any, are raised one after the other."""

    def __init__(self) -> None:
        self.collections: dict[str, Rows] = {}
        self.fields: dict[str, dict[str, dict[str, Any]]] = {}
        self.aliases: dict[str, str] = {}
        self.indexes: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[Exception]] = {}
        self.left_open: list[object] = []
        """Synchronous clients and iterations that are not closed."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> SmallMilvus:
        monkeypatch.setattr(client, "AsyncMilvusClient", lambda *_, **given: _Asynchronous(self, given))
        monkeypatch.setattr(client, "MilvusClient", lambda *_, **given: _Synchronous(self, given))
        return self

    def ask(self, kind: str, given: dict[str, Any]) -> None:
        self.asked.append((kind, given))
        if self.answers.get(kind):
            raise self.answers[kind].pop(0)

    def rows(self, name: str) -> Rows:
        found = self.aliases.get(name, name)
        if found not in self.collections:
            raise MilvusException(100, f"collection not found: {name}")
        return self.collections[found]


def admits(text: str) -> Callable[[dict[str, Any]], bool]:
    """What a filter lets through."""
    if text.startswith("item_id in "):
        wanted = set(json.loads(text.removeprefix("item_id in ")))
        return lambda row: row["item_id"] in wanted
    if deleted := re.fullmatch(r'content_hash == "" and published_at_us < (-?\d+)', text):
        return lambda row: row["content_hash"] == "" and row["published_at_us"] < int(deleted[1])
    return {"searchable == true": lambda row: bool(row["searchable"]), 'item_id != ""': lambda row: True}[text]


class _Plain:
    def __init__(self, server: SmallMilvus, options: dict[str, Any]) -> None:
        self.server, self.options = server, options

    def _admitted(self, name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
        return [row for row in self.server.rows(name).values() if admits(given["filter"])(row)]

    def _query(self, name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
        found, fields = self._admitted(name, given), given["output_fields"]
        if fields == ["count(*)"]:
            return [{"count(*)": len(found)}]
        return [{field: row[field] for field in fields} for row in found]

    def _described(self, name: str) -> dict[str, Any]:
        self.server.ask("describe", {"name": name})
        self.server.rows(name)
        found = self.server.aliases.get(name, name)
        fields = [{"name": field, "params": options} for field, options in self.server.fields[found].items()]
        return {"collection_name": found, "fields": fields}


class _Asynchronous(_Plain):
    async def close(self) -> None: ...

    async def load_collection(self, name: str, **given: Any) -> None:
        self.server.ask("load", {"name": name, **given})

    async def upsert(self, name: str, data: list[dict[str, Any]], **given: Any) -> None:
        self.server.ask("upsert", given)
        ids = [row["item_id"] for row in data]
        assert len(ids) == len(set(ids)), "a server keeps both rows of two equal ids"
        self.server.rows(name).update({row["item_id"]: row for row in data})

    async def delete(self, name: str, **given: Any) -> None:
        self.server.ask("delete", {"name": name, **given})
        for row in self._admitted(name, given):
            del self.server.rows(name)[row["item_id"]]

    async def describe_collection(self, name: str, **given: Any) -> dict[str, Any]:
        return self._described(name)

    async def list_collections(self, **given: Any) -> list[str]:
        return list(self.server.collections)

    async def list_aliases(self, name: str, **given: Any) -> list[str]:
        return [alias for alias, target in self.server.aliases.items() if target == name]

    async def query(self, name: str, **given: Any) -> Any:
        self.server.ask("query", given)
        return self._query(name, given)

    async def search(self, name: str, *, data: Any, limit: int, **given: Any) -> Any:
        self.server.ask("search", given)
        rows = self._admitted(name, given)
        found = []
        for vector in data:
            hits = [{"item_id": row["item_id"], "distance": float(np.dot(row["emb"], vector))} for row in rows]
            found.append(sorted(hits, key=lambda hit: -hit["distance"])[:limit])
        return found


class _Schema:
    def __init__(self) -> None:
        self.fields: dict[str, dict[str, Any]] = {}

    def add_field(self, name: str, **options: Any) -> None:
        self.fields[name] = options


class _Iterator:
    def __init__(self, server: SmallMilvus, rows: list[dict[str, Any]], size: int) -> None:
        self._batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._open = server.left_open
        self._open.append(self)

    def next(self) -> list[dict[str, Any]]:
        return self._batches.pop(0) if self._batches else []

    def close(self) -> None:
        self._open.remove(self)


class _Index(list[Any]):
    def add_index(self, field: str, **options: Any) -> None:
        self.append((field, options))


class _Synchronous(_Plain):
    def __init__(self, server: SmallMilvus, given: dict[str, Any]) -> None:
        super().__init__(server, given)
        server.left_open.append(self)

    def close(self) -> None:
        self.server.left_open.remove(self)

    def create_schema(self, **options: Any) -> _Schema:
        return _Schema()

    def create_collection(self, name: str, *, schema: _Schema, **options: Any) -> None:
        self.server.ask("create", {"name": name, **options})
        self.server.collections[name], self.server.fields[name] = {}, schema.fields

    def has_collection(self, name: str) -> bool:
        return name in self.server.collections

    def list_collections(self) -> list[str]:
        return list(self.server.collections)

    def prepare_index_params(self) -> _Index:
        return _Index()

    def create_index(self, name: str, index: _Index) -> None:
        self.server.ask("create_index", {"name": name})
        self.server.indexes[name] = index

    def list_indexes(self, name: str) -> list[Any]:
        return self.server.indexes.get(name, [])

    def create_alias(self, name: str, alias: str) -> None:
        self.server.ask("create_alias", {"name": name, "alias": alias})
        self.server.aliases[alias] = name

    def list_aliases(self, name: str) -> dict[str, list[str]]:
        return {"aliases": [alias for alias, target in self.server.aliases.items() if target == name]}

    def load_collection(self, name: str) -> None:
        self.server.ask("load", {"name": name})

    def describe_collection(self, name: str) -> dict[str, Any]:
        return self._described(name)

    def query(self, name: str, *, limit: int, **given: Any) -> Any:
        return self._query(name, given)[:limit]

    def query_iterator(self, name: str, *, batch_size: int, **given: Any) -> Any:
        self.server.ask("iterate", given)
        return _Iterator(self.server, self._query(name, given), batch_size)
