"""The center in Milvus: setting up, what a call waits for, which collections it touches, what an answer means."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError
from structlog.testing import capture_logs

from schemas.errors import Misconfigured, StoreUnavailable, WriteRejected
from streams.stores.vectors import milvus_index
from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.collection import mark_filled, read_center
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.item_index import ItemRow, deletion_mark
from streams.stores.vectors.milvus_index import MilvusItemIndex, collection_name, to_milvus
from streams.stores.vectors.row_scan import MilvusRowScan
from tests.factories.small_milvus import SmallMilvus

OWN = collection_name("item_emb", "e")
REFUSED = MilvusException(1, "overloaded")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallMilvus]:
    server = SmallMilvus().install(monkeypatch)
    yield server
    assert server.left_open == []


def make_index(**config: Any) -> MilvusItemIndex:
    return MilvusItemIndex(MilvusConfig(**config), encoder_version="e", dim=2)


def make_row(item_id: str) -> ItemRow:
    until = datetime(2026, 1, 1, tzinfo=UTC)
    mark = deletion_mark(item_id, encoder_version="e", dim=2, partition=0, offset=0, time_ms=0, until=until)
    return replace(mark, vector=np.array([0.6, 0.8], np.float32), content_hash="c", has_title=True)


async def test_what_a_worker_that_died_half_way_left_is_completed(server: SmallMilvus) -> None:
    for kind in ("create", "create_index", "create_alias"):
        server.answers[kind] = [REFUSED]
        with pytest.raises(StoreUnavailable):
            await make_index().open()
        assert server.aliases == {}
    await make_index().open()
    await make_index().open()
    assert server.aliases == {"item_emb": OWN} and len(server.indexes[OWN]) == 1
    ((field, options),) = server.indexes[OWN]
    assert (field, options["metric_type"]) == ("emb", "IP") and server.fields[OWN]["emb"]["dim"] == 2
    asked = [kind for kind, _ in server.asked]
    assert asked.count("create") == 2 and asked.count("create_alias") == 2 and asked[-1] == "load"
    with pytest.raises(Misconfigured, match=rf"{OWN}.*'e2'.*MIM_ENCODER__BUNDLE.*MIM_MILVUS__ALIAS"):
        await MilvusItemIndex(MilvusConfig(), encoder_version="e2", dim=2).open()
    assert list(server.collections) == [OWN]


async def test_a_step_that_another_worker_took_meanwhile_is_no_failure(server: SmallMilvus) -> None:
    plain = server.ask

    def overtaken(kind: str, given: dict[str, Any]) -> None:
        plain(kind, given)
        if kind == "create_alias":
            server.aliases[given["alias"]] = given["name"]
            raise MilvusException(1602, "alias exists")

    server.ask = overtaken  # type: ignore[method-assign]
    await make_index().open()
    assert server.aliases == {"item_emb": OWN}


async def test_what_has_to_see_every_write_waits_for_it_and_a_search_does_as_the_setting_says(
    server: SmallMilvus,
) -> None:
    index = make_index(consistency_level="Eventually", timeout_seconds=3.0)
    await index.open()
    await index.upsert([make_row("a")])
    server.asked.clear()
    await index.fetch(["a"])
    await index.fetch(["a"], fresh=False)
    await index.count()
    await index.search(np.array([[1.0, 0.0]]), 200)
    await MilvusRowScan(MilvusConfig()).choose(lambda row: True)
    await index.close()
    levels = [given["consistency_level"] for _, given in server.asked]
    assert levels == ["Strong", "Eventually", "Strong", "Eventually", "Strong"]
    (searched,) = [given for kind, given in server.asked if kind == "search"]
    assert searched["search_params"] == {"metric_type": "IP", "params": {"ef": 200}} and searched["timeout"] == 3.0


async def test_a_scan_that_is_broken_off_leaves_nothing_open(server: SmallMilvus) -> None:
    index = make_index()
    await index.open()
    await index.upsert([make_row("a")])
    with pytest.raises(ZeroDivisionError):
        await MilvusRowScan(MilvusConfig()).choose(lambda row: bool(1 // row.offset))
    assert server.left_open == []
    await index.close()


async def test_one_write_is_in_flight_at_a_time(server: SmallMilvus, monkeypatch: pytest.MonkeyPatch) -> None:
    index, flying, most = make_index(), 0, 0

    async def call(what: str, operation: Any) -> None:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0)
        flying -= 1

    monkeypatch.setattr(index._milvus, "call", call)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    writes = [
        index.upsert([make_row("a")]),
        index.delete(["a"]),
        index.forget_deleted(now),
        index.upsert([make_row("b")]),
    ]
    await asyncio.gather(*writes)
    assert most == 1


async def test_a_delete_reaches_other_encoders_of_the_alias_and_no_other_center(server: SmallMilvus) -> None:
    index = make_index()
    await index.open()
    older, neighbour = collection_name("item_emb", "older"), collection_name("item_emb__b", "e")
    for name in (older, neighbour, "item_embx__e_000000", "mine"):
        server.collections[name] = {}
    server.aliases["item_emb__b"] = neighbour
    for rows in server.collections.values():
        rows.update({item_id: to_milvus(make_row(item_id)) for item_id in ("a", "b", 'c"')})
    await index.delete(["a", 'c"'])
    left = {name: sorted(rows) for name, rows in server.collections.items()}
    whole = ["a", "b", 'c"']
    others = dict.fromkeys((neighbour, "item_embx__e_000000", "mine"), whole)
    assert left == {OWN: ["b"], older: ["b"], **others}
    await index.close()


async def test_a_center_is_described_by_what_lies_behind_the_alias(server: SmallMilvus) -> None:
    config = MilvusConfig()
    assert await read_center(config) is None
    server.answers["describe"] = [MilvusException(1, "overloaded")]
    with pytest.raises(StoreUnavailable):
        await read_center(config)
    index = make_index()
    await index.open()
    empty = await read_center(config)
    assert empty is not None and (empty.name, empty.dim, empty.encoder_version, empty.is_filled) == (
        OWN,
        2,
        None,
        False,
    )
    await index.upsert([make_row("a")])
    await mark_filled(config, empty)
    filled = await read_center(config)
    assert filled is not None and (filled.encoder_version, filled.is_filled) == ("e", True)
    server.answers["create_alias"] = [MilvusException(1602, "alias exists")] * 2
    await mark_filled(config, empty)  # another worker was first
    del server.aliases[f"{OWN}_filled"]
    with pytest.raises(StoreUnavailable):
        await mark_filled(config, empty)
    del server.fields[OWN]["emb"]
    with pytest.raises(Misconfigured, match="not a representation center; set MIM_MILVUS__ALIAS"):
        await read_center(config)
    await index.close()


@pytest.mark.parametrize(("times", "answered"), [(1, True), (2, False)], ids=["loaded again", "not to be loaded"])
async def test_a_collection_that_a_restart_released_is_loaded_and_the_call_repeated_once(
    server: SmallMilvus, times: int, answered: bool
) -> None:
    index = make_index()
    await index.open()
    server.asked.clear()
    server.answers["query"] = [MilvusException(101, "collection not loaded")] * times
    if answered:
        assert await index.count() == 0
    else:
        with pytest.raises(StoreUnavailable, match="not loaded"):
            await index.count()
    assert [kind for kind, _ in server.asked] == ["query", "load", "query"]
    assert server.asked[1][1]["name"] == "item_emb"
    await index.close()


@pytest.mark.parametrize(
    ("error", "expected", "told"),
    [
        (MilvusException(6, "illegal argument"), WriteRejected, "Milvus refuses a write: illegal argument"),
        (MilvusException(1100, "invalid parameter"), WriteRejected, "refuses a write"),
        (MilvusException(1101, "missing parameter"), WriteRejected, "refuses a write"),
        (MilvusException(1804, "data mismatch"), WriteRejected, "refuses a write"),
        (ParamError(message="limit"), WriteRejected, "refuses a write"),
        (DataNotMatchException(message="no field"), WriteRejected, "refuses a write"),
        (MilvusException(1400, "Permission Denied"), Misconfigured, "host:1 refuses a write.*MIM_MILVUS__TOKEN"),
        (MilvusException(65535, "auth check failure"), Misconfigured, "MIM_MILVUS__TOKEN"),
        (MilvusException(1, "overloaded"), StoreUnavailable, r"a write at http://host:1 .*overloaded \(code 1\)"),
        (MilvusException(100, "collection not found"), StoreUnavailable, "code 100"),
        (TimeoutError(), StoreUnavailable, "TimeoutError"),
        (OSError("reset"), StoreUnavailable, "reset"),
        (grpc.RpcError("gone"), StoreUnavailable, "gone"),
    ],
    ids=lambda one: f"{type(one).__name__}-{getattr(one, 'code', '')}" if isinstance(one, Exception) else None,
)
async def test_what_heals_by_waiting_is_told_apart_from_what_the_server_refuses(
    server: SmallMilvus, error: Exception, expected: type[Exception], told: str
) -> None:
    connection = MilvusConnection(MilvusConfig(uri="http://me:secret@host:1"))

    async def fail(client: Any) -> None:
        raise error

    def fail_blocking(client: Any) -> None:
        raise error

    for call in (lambda: connection.call("a write", fail), lambda: connection.call_blocking("a write", fail_blocking)):
        with pytest.raises(expected, match=told) as caught:
            await call()
        assert "secret" not in str(caught.value)
    await connection.close()


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, r"\(MIM_MILVUS__URI\)"),
        ({"uri": "https://host:1"}, r"\(MIM_MILVUS__URI, MIM_MILVUS__SSL_CAFILE\)"),
        ({"token": "a:b"}, r"\(MIM_MILVUS__URI, MIM_MILVUS__TOKEN\)"),
    ],
)
async def test_silence_names_the_settings_that_may_be_wrong(
    server: SmallMilvus, config: dict[str, Any], settings: str
) -> None:
    connection = MilvusConnection(MilvusConfig.model_validate(config))

    async def fail(client: Any) -> None:
        raise TimeoutError

    with pytest.raises(StoreUnavailable, match=settings):
        await connection.call("a read", fail)
    await connection.close()


@pytest.mark.parametrize(("code", "kept"), [(1100, True), (100, True), (6, True), (1, False), (65535, False)])
async def test_only_a_failure_of_the_connection_costs_it(server: SmallMilvus, code: int, kept: bool) -> None:
    connection, seen = MilvusConnection(MilvusConfig()), list[Any]()

    async def fail(client: Any) -> None:
        seen.append(client)
        raise MilvusException(code, "refused")

    for _ in range(2):
        with pytest.raises((StoreUnavailable, WriteRejected)):
            await connection.call("a read", fail)
    assert (seen[0] is seen[1]) is kept
    await connection.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ssl_certfile": "c"},
        {"ssl_keyfile": "k", "ssl_cafile": "a", "uri": "https://h"},
        {"ssl_certfile": "c", "ssl_keyfile": "k", "uri": "https://h"},
        {"ssl_cafile": "a"},
    ],
)
def test_files_of_certificates_go_together_and_need_tls(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="ssl_cafile"):
        MilvusConfig.model_validate(wrong)


def test_a_client_gets_the_files_that_are_set() -> None:
    ours = {"ssl_certfile": "c", "ssl_keyfile": "k", "ssl_cafile": "a", "uri": "https://h"}
    assert MilvusConfig().tls_options() == {}
    assert MilvusConfig(uri="https://h", ssl_cafile="a").tls_options() == {"secure": True, "server_pem_path": "a"}
    assert MilvusConfig.model_validate(ours).tls_options() == {
        "secure": True, "ca_pem_path": "a", "client_pem_path": "c", "client_key_path": "k",
    }  # fmt: skip


async def test_a_collection_of_an_earlier_build_is_told_once(
    server: SmallMilvus, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {name: options for name, options in milvus_index._FIELDS.items() if name != "facts"}
    with monkeypatch.context() as earlier:
        earlier.setattr(milvus_index, "_FIELDS", fields)
        await make_index().open()
    index = make_index()
    with capture_logs() as logs:
        await index.upsert([make_row("a")])
        await index.fetch(["a"])
    assert [line["event"] for line in logs] == ["milvus.no_facts"]
