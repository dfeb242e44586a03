"""One suite for every item index."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from pymilvus import MilvusClient

from schemas.errors import Misconfigured, Reason, StoreUnavailable, WriteRejected
from streams.stack.milvus_part import MilvusPart
from streams.stores.vectors import milvus_index
from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.item_index import FOR_EVER, InMemoryItemIndex, ItemIndex, ItemRow, deletion_mark
from streams.stores.vectors.milvus_index import MilvusItemIndex, collection_name
from streams.stores.vectors.row_scan import InMemoryRowScan, MilvusRowScan, RowScan, RowSource, source_of
from tests.factories.part_server import PartServer, part_server
from tests.factories.small_milvus import SmallMilvus

DIM = 16
VERSION = "enc-1.a"
STRANGE_IDS = ["it's", 'say "hi"', "back\\slash", "漢字é", "50 %", "a,b", "{x}", "item_id == 1 or true", "x" * 200]


def unit(seed: int) -> NDArray[np.float32]:
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def row(item_id: str, seed: int = 0, *, offset: int = 0, pending: bool = False, **changes: object) -> ItemRow:
    plain = ItemRow(
        item_id=item_id,
        encoder_version=VERSION,
        vector=np.zeros(DIM, np.float32) if pending else unit(seed),
        content_hash="c" * 32,
        published_at=datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC),
        category="shoes",
        price=3.5,
        first_price=4.25,
        has_title=not pending,
        has_image=False,
        source_partition=2,
        source_offset=offset,
        produced_at_ms=1_790_000_000_123,
        title="a red shoe",
        year=1999,
        attributes={"colour": "röd", "tags": ["a", "b"], "pages": 7.5},
        published_at_is="inferred",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def same(one: ItemRow, other: ItemRow) -> bool:
    plain = [{**vars(r), "vector": None} for r in (one, other)]
    return plain[0] == plain[1] and bool(np.allclose(one.vector, other.vector, atol=1e-6))


async def nearest(index: ItemIndex, seed: int, k: int) -> list[str]:
    (answer,) = await index.search(unit(seed)[None], k)
    return [item_id for item_id, _ in answer]


MOMENT = datetime(2026, 9, 17, 12, tzinfo=UTC)


def mark(item_id: str, *, until: datetime = FOR_EVER) -> ItemRow:
    place = {"partition": 1, "offset": 7, "time_ms": 1_790_000_000_123}
    return deletion_mark(item_id, encoder_version=VERSION, dim=DIM, until=until, **place)


class ItemIndexContract:
    @pytest.fixture
    def index(self) -> ItemIndex:
        raise NotImplementedError

    async def test_a_row_comes_back_as_it_was_written(self, index: ItemIndex) -> None:
        written = [
            row("a", 1),
            row("b", 2, category=None, price=None, first_price=None, title="", has_image=True),
            row("c", 3, price=0.0, source_offset=2**40, published_at=datetime(1969, 7, 20, tzinfo=UTC)),
        ]
        await index.upsert(written)
        found = await index.fetch(["c", "b", "a", "missing", "a"])
        assert set(found) == {"a", "b", "c"}
        assert all(same(found[r.item_id], r) for r in written)

    @pytest.mark.parametrize("item_id", STRANGE_IDS)
    async def test_any_identifier_can_be_written_found_and_deleted(self, index: ItemIndex, item_id: str) -> None:
        await index.upsert([row(item_id, 1), row("bystander", 2)])
        assert set(await index.fetch([item_id])) == {item_id}
        await index.delete([item_id])
        assert set(await index.fetch([item_id, "bystander"])) == {"bystander"}

    async def test_the_last_row_of_an_id_wins_inside_one_call(self, index: ItemIndex) -> None:
        await index.upsert([row("a", 1, offset=1), row("b", 2), row("a", 3, offset=7)])
        assert (await index.fetch(["a"]))["a"].source_offset == 7
        assert await index.count() == 2
        assert await nearest(index, 3, 5) == ["a", "b"]

    async def test_an_upsert_replaces_the_whole_row(self, index: ItemIndex) -> None:
        await index.upsert([row("a", 1, category="old", title="old")])
        await index.upsert([row("a", 2, category=None, title="")])
        found = (await index.fetch(["a"]))["a"]
        assert (found.category, found.title, await index.count()) == (None, "", 1)
        assert np.allclose(found.vector, unit(2), atol=1e-6)

    async def test_a_deleted_row_is_neither_read_nor_found_nor_counted(self, index: ItemIndex) -> None:
        await index.upsert([row("a", 1), row("b", 2)])
        await index.delete(["a", "never-there"])
        assert set(await index.fetch(["a", "b"])) == {"b"}
        assert await nearest(index, 1, 5) == ["b"]
        assert await index.count() == 1

    async def test_a_deleted_row_can_come_back(self, index: ItemIndex) -> None:
        await index.upsert([row("a", 1)])
        await index.delete(["a"])
        await index.upsert([row("a", 2)])
        assert np.allclose((await index.fetch(["a"]))["a"].vector, unit(2), atol=1e-6)

    async def test_search_gives_cosines_nearest_first(self, index: ItemIndex) -> None:
        rows = [row(f"i{n}", n) for n in range(50)]
        await index.upsert(rows)
        queries = np.stack([unit(7), unit(1000)])
        answers = await index.search(queries, 4)
        exact = queries @ np.stack([r.vector for r in rows]).T
        for line, answer in zip(exact, answers, strict=True):
            best = np.argsort(-line)[:4]
            assert [item_id for item_id, _ in answer] == [f"i{n}" for n in best]
            assert np.allclose([cosine for _, cosine in answer], line[best], atol=1e-5)

    async def test_a_pending_row_is_read_only_on_request_and_never_found(self, index: ItemIndex) -> None:
        await index.upsert([row("waiting", offset=5, pending=True), row("a", 1)])
        assert await index.fetch(["waiting"]) == {}
        assert (await index.fetch(["waiting"], pending=True))["waiting"].source_offset == 5
        assert await nearest(index, 1, 5) == ["a"]
        assert await index.count() == 1

    @pytest.mark.parametrize(
        "bad",
        [
            pytest.param(np.full(DIM, np.nan, np.float32), id="nan"),
            pytest.param(np.zeros(DIM, np.float32), id="zero"),
            pytest.param(2 * unit(1), id="too-long"),
            pytest.param(np.where(np.arange(DIM) == 3, np.inf, unit(1)).astype(np.float32), id="infinite"),
            pytest.param(unit(1)[:-1], id="too-narrow"),
        ],
    )
    async def test_a_vector_that_is_no_unit_vector_is_refused_with_its_call(
        self, index: ItemIndex, bad: NDArray[np.float32]
    ) -> None:
        with pytest.raises(WriteRejected) as caught:
            await index.upsert([row("good", 1), row("bad", vector=bad)])
        assert caught.value.reason is Reason.BAD_VECTOR and "'bad'" in str(caught.value)
        assert await index.count() == 0

    async def test_a_vector_of_another_encoder_is_refused(self, index: ItemIndex) -> None:
        with pytest.raises(WriteRejected, match="other-2"):
            await index.upsert([row("a", 1, encoder_version="other-2")])

    async def test_empty_calls_give_empty_results(self, index: ItemIndex) -> None:
        await index.upsert([])
        await index.delete([])
        assert await index.fetch([]) == {}
        assert await index.search(np.zeros((0, DIM), np.float32), 3) == []
        assert await index.search(unit(1)[None], 3) == [[]]
        assert await index.count() == 0

    async def test_writes_of_many_tasks_all_arrive(self, index: ItemIndex) -> None:
        await asyncio.gather(*(index.upsert([row(f"t{n}-{m}", n) for m in range(20)]) for n in range(10)))
        await asyncio.gather(*(index.delete([f"t{n}-0"]) for n in range(10)))
        assert await index.count() == 190

    @pytest.fixture
    def scan(self) -> RowScan:
        raise NotImplementedError

    async def test_rows_are_scanned_by_their_source(self, index: ItemIndex, scan: RowScan) -> None:
        rows = [row(f"i{n}", n, offset=n, source_partition=n % 3, pending=n % 7 == 0) for n in range(2_300)]
        for start in range(0, len(rows), 500):
            await index.upsert(rows[start : start + 500])
        await index.delete(["i1"])
        seen: list[str] = []

        def odd(source: RowSource) -> bool:
            seen.append(source.item_id)
            return source.offset % 2 == 1

        chosen = await scan.choose(odd)
        assert sorted(seen) == sorted(r.item_id for r in rows if r.item_id != "i1")
        assert set(chosen) == {source_of(r) for r in rows if r.source_offset % 2 and r.item_id != "i1"}

    async def test_a_mark_of_a_deleted_item_is_never_found_and_goes_when_its_time_is_over(
        self, index: ItemIndex, scan: RowScan
    ) -> None:
        marks = [mark("old", until=MOMENT), mark("new", until=MOMENT + timedelta(microseconds=2)), mark("kept")]
        await index.upsert([row("a", 1), row("new", 1), row("waiting", pending=True, published_at=MOMENT), *marks])
        assert (set(await index.fetch(["a", "new"])), await index.count()) == ({"a"}, 1)
        assert await nearest(index, 1, 5) == ["a"]
        there = (await index.fetch(["old", "new", "kept"], pending=True)).values()
        assert {one.item_id: (one.is_deleted, one.published_at) for one in there} == {
            one.item_id: (True, one.published_at) for one in marks
        }
        assert {one.item_id for one in await scan.choose(lambda source: source.is_deleted)} == {"old", "new", "kept"}
        await index.forget_deleted(MOMENT + timedelta(microseconds=1))
        left = await index.fetch(["a", "old", "new", "kept", "waiting"], pending=True)
        assert set(left) == {"a", "new", "kept", "waiting"}


class TestInMemoryItemIndex(ItemIndexContract):
    @pytest.fixture
    def scan(self, index: InMemoryItemIndex) -> RowScan:
        return InMemoryRowScan(index)

    @pytest.fixture
    async def index(self) -> AsyncIterator[ItemIndex]:
        index = InMemoryItemIndex(encoder_version=VERSION, dim=DIM)
        await index.open()
        yield index
        await index.close()


class MilvusContract(ItemIndexContract):
    @pytest.fixture
    def scan(self, config: MilvusConfig) -> RowScan:
        return MilvusRowScan(config)

    @pytest.fixture
    async def index(self, config: MilvusConfig) -> AsyncIterator[ItemIndex]:
        index = MilvusItemIndex(config, encoder_version=VERSION, dim=DIM)
        await index.open()
        yield index
        await index.close()


class TestMilvusItemIndexHere(MilvusContract):
    @pytest.fixture
    def config(self, monkeypatch: pytest.MonkeyPatch) -> MilvusConfig:
        SmallMilvus().install(monkeypatch)
        return MilvusConfig()


@pytest.fixture(scope="module")
def milvus(
    tmp_path_factory: pytest.TempPathFactory, unused_tcp_port_factory: Callable[[], int]
) -> Iterator[PartServer]:
    with part_server(MilvusPart(tmp_path_factory.mktemp("milvus"), unused_tcp_port_factory())) as server:
        yield server


@pytest.mark.live
class TestMilvusItemIndex(MilvusContract):
    @pytest.fixture
    def config(self, milvus: PartServer, request: pytest.FixtureRequest) -> MilvusConfig:
        uri, alias = f"http://127.0.0.1:{milvus.part.port}", f"t{abs(hash(request.node.nodeid)):x}"[:40]
        return MilvusConfig(uri=uri, alias=alias, timeout_seconds=5)

    async def test_a_delete_reaches_the_collections_of_other_encoders_behind_the_alias(
        self, config: MilvusConfig, index: ItemIndex
    ) -> None:
        others = [config.model_copy(update={"alias": f"{config.alias}{more}"}) for more in ("x", "__b")]
        for neighbour in (config, *others):
            await index.upsert([row("a", 1), row("b", 2)])
            name = collection_name(neighbour.alias, "an-older-encoder")
            connection = MilvusConnection(config)
            try:
                await connection.call_blocking("copying", partial(_copy, collection_name(config.alias, VERSION), name))
                if neighbour is not config:
                    await connection.call_blocking(
                        "naming", lambda client, name=name, to=neighbour.alias: client.create_alias(name, to)
                    )
                await index.delete(["a"])
                left = await connection.call_blocking("reading", partial(_ids, name))
            finally:
                await connection.close()
            # another center's collection, whose alias only begins alike, is left alone
            assert left == ({"b"} if neighbour is config else {"a", "b"})

    async def test_a_client_recovers_by_itself_when_the_server_was_killed(
        self, milvus: PartServer, index: ItemIndex
    ) -> None:
        await index.upsert([row("a", 1), row("b", 2)])
        await index.delete(["b"])
        milvus.kill()
        with pytest.raises(StoreUnavailable, match="MIM_MILVUS__URI"):
            await index.fetch(["a"])
        with pytest.raises(StoreUnavailable):
            await index.upsert([row("c", 3)])
        milvus.start_only()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(StoreUnavailable):
                await index.upsert([row("c", 3)])
                break
            await asyncio.sleep(0.1)
        assert set(await index.fetch(["a", "b", "c"])) == {"a", "c"}
        assert await nearest(index, 1, 1) == ["a"]

    async def test_each_operation_loads_a_restarted_collection_again(
        self, milvus: PartServer, index: ItemIndex
    ) -> None:
        await index.upsert([row("a", 1), row("b", 2)])
        for operation in (
            lambda: index.search(unit(1)[None], 1),
            lambda: index.count(),
            lambda: index.delete(["b"]),
            lambda: index.fetch(["a"]),
        ):
            milvus.kill()
            milvus.start()
            await operation()
        assert set(await index.fetch(["a", "b"])) == {"a"}

    async def test_opening_again_keeps_what_is_there(self, config: MilvusConfig, index: ItemIndex) -> None:
        await index.upsert([row("a", 1)])
        again = MilvusItemIndex(config, encoder_version=VERSION, dim=DIM)
        await again.open()
        assert set(await again.fetch(["a"])) == {"a"}
        await again.close()

    async def test_a_collection_of_an_earlier_build_holds_rows_without_facts(
        self, config: MilvusConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fields = {name: options for name, options in milvus_index._FIELDS.items() if name != "facts"}
        with monkeypatch.context() as earlier:
            earlier.setattr(milvus_index, "_FIELDS", fields)
            await MilvusItemIndex(config, encoder_version=VERSION, dim=DIM).open()
        index = MilvusItemIndex(config, encoder_version=VERSION, dim=DIM)
        await index.open()
        await index.upsert([row("a", 1)])
        found = (await index.fetch(["a"]))["a"]
        assert same(found, row("a", 1, year=None, attributes={}, published_at_is="known", keeps_facts=False))
        reader = MilvusItemIndex(config, encoder_version=VERSION, dim=DIM)  # not opened: reading rows needs no encoder
        assert set(await reader.fetch(["a"])) == {"a"}
        for one in (index, reader):
            await one.close()

    async def test_an_alias_of_another_encoder_is_refused_with_a_way_out(
        self, config: MilvusConfig, index: ItemIndex
    ) -> None:
        with pytest.raises(Misconfigured, match=r"enc_1_a.*enc-2.*MIM_MILVUS__ALIAS"):
            await MilvusItemIndex(config, encoder_version="enc-2", dim=DIM).open()

    async def test_workers_that_start_together_agree(self, config: MilvusConfig) -> None:
        shared = config.model_copy(update={"alias": "together"})
        indexes = [MilvusItemIndex(shared, encoder_version=VERSION, dim=DIM) for _ in range(4)]
        await asyncio.gather(*(index.open() for index in indexes))
        await indexes[0].upsert([row("a", 1)])
        assert set(await indexes[3].fetch(["a"])) == {"a"}
        for index in indexes:
            await index.close()

    async def test_an_address_where_nothing_listens_is_named_at_start(self) -> None:
        nowhere = MilvusConfig(uri="http://127.0.0.1:9", timeout_seconds=1)
        index = MilvusItemIndex(nowhere, encoder_version=VERSION, dim=DIM)
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9.*MIM_MILVUS__URI"):
            await index.open()


def test_versions_that_differ_only_in_punctuation_get_their_own_collections() -> None:
    assert collection_name("a", "x-1.2") != collection_name("a", "x-1-2")


def _copy(source: str, target: str, client: MilvusClient) -> None:
    """A collection as another encoder would have left it: the same fields, the same rows."""
    described = client.describe_collection(source)
    schema = client.create_schema(enable_dynamic_field=False)
    for field in described["fields"]:
        schema.add_field(
            field["name"], field["type"], is_primary=bool(field.get("is_primary")), **(field.get("params") or {})
        )
    client.create_collection(target, schema=schema)
    rows = client.query(source, filter='item_id != ""', output_fields=["*"], consistency_level="Strong")
    client.insert(target, [{field["name"]: one[field["name"]] for field in described["fields"]} for one in rows])


def _ids(name: str, client: MilvusClient) -> set[str]:
    index = client.prepare_index_params()
    index.add_index("emb", index_type="FLAT", metric_type="IP")
    client.create_index(name, index)
    client.load_collection(name)
    rows = client.query(name, filter='item_id != ""', output_fields=["item_id"], consistency_level="Strong")
    return {str(one["item_id"]) for one in rows}
