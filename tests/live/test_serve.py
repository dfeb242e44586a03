"""`mimstream serve` against real parts: true within its bound, swapping models under load, outliving a broker."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
import pytest

from schemas.manifests import ReleaseNotice
from streams.broker.clients import make_producer
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.indexing.announcements import KafkaOutbox
from streams.settings import Settings
from streams.stack.run import RunningStack
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.milvus_index import MilvusItemIndex
from tests.factories import vector_cache
from tests.factories.index_worker import SOON, Start
from tests.factories.recorded_log import behaviour_store
from tests.factories.releases import release_untrained
from tests.factories.samples import behaviour
from tests.factories.waiting import until

VERSION = "test-encoder-1"
DIM = 16
BOUND_SECONDS = 3.0
SLACK_SECONDS = 7.0
"""For a machine that has other things to do; what is missed altogether stays wrong for ever."""
row = partial(vector_cache.row, version=VERSION, dim=DIM)
release = partial(release_untrained, encoder_version=VERSION, dim=DIM)


class Shop:
    """Writes the center and announces, as `mimstream index` does."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.index = MilvusItemIndex(settings.milvus, encoder_version=VERSION, dim=DIM)

    async def write(self, *rows: ItemRow, gone: tuple[str, ...] = (), announce: bool = True) -> None:
        if rows:
            await self.index.upsert(rows)
        if gone:
            await self.index.delete(gone)
        if announce:
            async with make_producer(self.settings.kafka) as producer:
                outbox = KafkaOutbox(producer, self.settings.kafka, self.settings.topics, encoder_version=VERSION)
                await outbox.announce(rows, gone)


@pytest.fixture
async def shop(settings: Settings) -> AsyncIterator[Shop]:
    shop = Shop(settings)
    await shop.index.open()
    await shop.write(*(row(f"i{n}", n) for n in range(30)))
    takes = [behaviour(f"e{n}", "click", user="ann", item=f"i{n}", second=n) for n in range(5)]
    async with behaviour_store(settings) as store:
        await store.bind(TopicIncarnation("c", "t", "i"))
        await store.record(0, list(map(BehaviourRecord, range(5), takes)), first_offset=0, next_offset=5)
    yield shop
    await shop.index.close()


class Api:
    def __init__(self, base: str) -> None:
        self.session = aiohttp.ClientSession(base)

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.session.post(path, json=body) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def serve(process: Start) -> AsyncIterator[Callable[..., Any]]:
    opened: list[Api] = []

    async def start(**env: str) -> tuple[Any, Api]:
        bound = {"MIM_SERVE__CACHE__MAX_STALENESS_SECONDS": str(BOUND_SECONDS)}
        child = process("serve", "--port", "0", env=bound | env)
        await asyncio.to_thread(child.wait_for, "serve.ready")
        found = re.search(r"http://127\.0\.0\.1:\d+", child.output())
        assert found
        opened.append(Api(found.group()))
        return child, opened[-1]

    yield start
    for api in opened:
        await api.session.close()


async def gone_after(api: Api, item_id: str, *, limit: float) -> float:
    """Seconds until scores, neighbours and items all know nothing of the item any more."""
    started = time.monotonic()
    while True:
        _, scored = await api.post("/v1/score", user_id="ann", item_ids=[item_id])
        _, near = await api.post("/v1/similar", item_id="i1", k=30)
        status, _ = await api.get(f"/v1/items/{item_id}")
        in_neighbours = item_id in {n["item_id"] for n in near["results"][0]["neighbours"]}
        if not scored["scores"][0]["has_vector"] and not in_neighbours and status == 404:
            return time.monotonic() - started
        assert time.monotonic() - started < limit, (scored, in_neighbours, status)
        await asyncio.sleep(0.02)


async def test_a_deleted_item_disappears_everywhere_within_the_bound(
    settings: Settings, shop: Shop, serve: Any
) -> None:
    release(settings, 1)
    child, api = await serve()
    await until(lambda: api.get("/readyz"), lambda found: found[0] == 200)
    for n in range(10, 13):
        _, scored = await api.post("/v1/score", user_id="ann", item_ids=[f"i{n}"])
        assert scored["scores"][0]["has_vector"] and scored["history_length"] == 5
        await shop.write(gone=(f"i{n}",))
        await gone_after(api, f"i{n}", limit=BOUND_SECONDS + SLACK_SECONDS)
    assert child.stop() == 0


async def test_a_delete_that_nobody_announced_is_seen_while_the_broker_is_away(
    stack: RunningStack, settings: Settings, shop: Shop, serve: Any
) -> None:
    release(settings, 1)
    _, api = await serve()
    for n in (14, 15):
        await api.post("/v1/score", user_id="ann", item_ids=[f"i{n}"])
    await asyncio.to_thread(stack.stop, "kafka")
    try:
        await shop.write(gone=("i14",), announce=False)
        await gone_after(api, "i14", limit=BOUND_SECONDS + SLACK_SECONDS)
        status, scored = await api.post("/v1/score", user_id="ann", item_ids=["i15"])
        assert status == 200 and scored["scores"][0]["has_vector"]
    finally:
        await asyncio.to_thread(stack.start, "kafka")
        await asyncio.to_thread(stack.wait_ready, "kafka")
    await shop.write(gone=("i15",))
    await gone_after(api, "i15", limit=BOUND_SECONDS + SLACK_SECONDS)


async def test_a_server_that_started_without_kafka_answers_says_so_and_catches_up(
    stack: RunningStack, settings: Settings, shop: Shop, serve: Any
) -> None:
    release(settings, 1)
    await asyncio.to_thread(stack.stop, "kafka")
    try:
        _, api = await serve()
        score = {"user_id": "ann", "item_ids": ["i20"]}
        _, before = await api.post("/v1/score", **score)
        status, readiness = await api.get("/readyz")
        assert (status, before["history_length"]) == (200, 5) and "Kafka" in readiness["unconfirmed"][0]
    finally:
        await asyncio.to_thread(stack.start, "kafka")
        await asyncio.to_thread(stack.wait_ready, "kafka")
    await until(lambda: api.get("/readyz"), lambda found: "Kafka" not in str(found[1]["unconfirmed"]))
    await shop.write(row("i20", 502))

    def is_new(answer: tuple[int, Any]) -> bool:
        return bool(answer[1]["scores"][0]["probability"] != before["scores"][0]["probability"])

    await until(lambda: api.post("/v1/score", **score), is_new, seconds=BOUND_SECONDS + SLACK_SECONDS)


async def test_a_new_and_an_updated_vector_reach_scores(settings: Settings, shop: Shop, serve: Any) -> None:
    release(settings, 1)
    _, api = await serve()
    score = {"user_id": "ann", "item_ids": ["i20", "fresh"]}
    _, before = await api.post("/v1/score", **score)
    assert [s["has_vector"] for s in before["scores"]] == [True, False]
    await shop.write(row("fresh", 500), row("i20", 501))

    def are_new(answer: tuple[int, Any]) -> bool:
        updated, fresh = answer[1]["scores"]
        return bool(fresh["has_vector"] and updated["probability"] != before["scores"][0]["probability"])

    await until(lambda: api.post("/v1/score", **score), are_new, seconds=BOUND_SECONDS + SLACK_SECONDS)


async def test_three_releases_are_taken_up_under_load_and_a_damaged_one_is_not(
    settings: Settings, shop: Shop, serve: Any
) -> None:
    child, api = await serve()
    assert (await api.post("/v1/score", user_id="ann", item_ids=["i1"]))[1]["error"]["code"] == "no_model"
    assert (await api.post("/v1/similar", item_id="i1"))[0] == 200
    assert (await api.get("/readyz"))[1]["checks"]["model"] == "no model has been released yet"
    first = release(settings, 1)
    await until(lambda: api.get("/readyz"), lambda answer: answer[0] == 200)
    stop = asyncio.Event()
    served: list[str] = []
    statuses: list[int] = []

    async def load() -> None:
        while not stop.is_set():
            status, answer = await api.post("/v1/score", user_id="ann", item_ids=[f"i{n}" for n in range(20)])
            statuses.append(status)
            served.append(answer.get("release_id"))
            await asyncio.sleep(0.03)

    asking = [asyncio.create_task(load()) for _ in range(2)]
    released = [first]
    try:
        async with make_producer(settings.kafka) as producer:
            for number in (2, 3):
                released.append(release(settings, number))
                notice = ReleaseNotice(
                    release_id=released[-1], weights_sha256="0", encoder_version=VERSION, released_at=datetime.now(UTC)
                )
                value = notice.model_dump_json().encode()
                await producer.send_and_wait(settings.topics.full_name("models"), value, key=b"r")
                await until(lambda: released[-1] in served, seconds=30)
        release(settings, 4, damage=True)
        await asyncio.to_thread(child.wait_for, "serve.model_refused")
        await asyncio.sleep(0.5)
        assert served[-1] == released[-1]
        released.append(release(settings, 5))
        await until(lambda: released[-1] in served, seconds=30)  # without a notice: found by polling
    finally:
        stop.set()
        await asyncio.gather(*asking)
    assert set(statuses) == {200}
    assert list(dict.fromkeys(served)) == released
    assert len(statuses) > 20 * len(released)  # under load all the while
    assert child.stop() == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MIM_REDIS__URL", "redis://127.0.0.1:1/0"),
        ("MIM_MILVUS__URI", "http://127.0.0.1:1"),
    ],
)
async def test_a_part_that_is_down_at_the_start_is_named_by_its_setting(
    shop: Shop, process: Start, variable: str, value: str
) -> None:
    child = process("serve", "--port", "0", env=SOON | {variable: value})
    assert child.wait() == 3
    assert variable in child.output()
    assert "Traceback" not in child.output()


async def test_a_text_finds_its_item_on_a_system_that_started_empty(settings: Settings, serve: Any) -> None:
    from encoders.base import ItemContent
    from encoders.loading import load_encoder

    _, api = await serve()
    status, answer = await api.post("/v1/similar", text="a red winter boot")
    assert (status, answer["results"][0]["neighbours"]) == (200, [])
    encoder = await asyncio.to_thread(load_encoder, settings.encoder)
    index = MilvusItemIndex(settings.milvus, encoder_version=encoder.version, dim=encoder.dim)
    await index.open()
    titles = {"boot": "red winter boot", "lamp": "desk lamp with a green shade", "novel": "a crime novel"}
    vectors = encoder.encode([encoder.prepare(ItemContent(title=title)) for title in titles.values()])
    rows = [row(name, 0, version=encoder.version, vector=vector) for name, vector in zip(titles, vectors, strict=True)]
    await index.upsert(rows)
    await index.close()
    status, answer = await api.post("/v1/similar", text="a red winter boot", k=1)
    assert answer["results"][0]["neighbours"][0]["item_id"] == "boot"
    assert answer["encoder_version"] == encoder.version
    status, answer = await api.post("/v1/similar", image="bm8gcGljdHVyZQ==")
    assert (status, answer["error"]["code"]) == (422, "bad_image")
