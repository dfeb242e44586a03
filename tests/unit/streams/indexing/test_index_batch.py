"""What a batch of items does to the center."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from encoders.base import ItemContent, Prepared
from schemas.errors import BrokerUnavailable, ContentUnavailable, Fenced, Reason, StoreUnavailable
from streams.indexing.announcements import as_embedding
from streams.indexing.config import IndexConfig
from streams.indexing.index_batch import index_batch
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow
from tests.factories.item_path import (
    DIM,
    NOW,
    PICTURE_URL,
    PRODUCED_MS,
    VERSION,
    CountingEncoder,
    ItemPath,
    b64,
    item,
    picture,
)


async def test_a_published_item_is_held_and_announced(path: ItemPath) -> None:
    red_shoe = path.publish("a", title="red shoe", price=5.0, category="shoes", image=b64(picture()))
    report = await path.index_all(red_shoe)
    row = path.rows["a"]
    assert np.allclose(row.vector, path.encoder.of(title="red shoe", category="shoes", image=picture()))
    assert (row.has_title, row.has_image, row.price, row.first_price) == (True, True, 5.0, 5.0)
    assert (row.source_partition, row.source_offset, row.produced_at_ms) == (0, 0, PRODUCED_MS)
    assert path.outbox.announced == [row]
    assert (report.events, report.encoded) == (1, 1)


async def test_the_last_word_on_each_key_wins_and_the_others_are_counted(path: ItemPath) -> None:
    report = await path.index_all(
        path.publish("a", title="one"),
        path.publish("b", title="x"),
        path.delete("b"),
        path.publish("a", title="two"),
        path.publish("c", title="y"),
        path.delete("c"),
        path.publish("c", title="z"),
    )
    assert set(path.on_sale) == {"a", "c"}
    assert path.rows["a"].title == "two"
    assert path.rows["c"].title == "z"
    assert report.superseded == 4
    assert path.encoder.encoded == 2


async def test_a_delete_removes_the_row_and_announces_a_tombstone(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="one"))
    await path.index_all(path.delete("a"), path.delete("never-there"))
    assert path.on_sale == {}
    assert path.outbox.announced[1:] == ["a", "never-there"]


async def test_a_change_of_price_alone_is_not_encoded_again(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="one", price=10.0))
    before = path.rows["a"]
    report = await path.index_all(path.publish("a", title="one", price=8.0))
    after = path.rows["a"]
    assert path.encoder.encoded == 1
    assert (after.price, after.first_price, after.source_offset) == (8.0, 10.0, 1)
    assert after.produced_at_ms == before.produced_at_ms + 1
    assert after.vector is before.vector
    assert report.rewritten == 1
    assert path.outbox.announced == [before, after]


@pytest.mark.parametrize(
    ("row", "encoded"),
    [({}, 0), ({"encoder_version": "of another"}, 1), ({"content_hash": "0" * 32}, 1), ({"first_price": 9.0}, 0),
     ({"first_price": None}, 1), ({"has_image": True}, 1)],
)  # fmt: skip
async def test_only_a_row_whose_vector_is_the_present_one_of_this_content_is_kept(
    path: ItemPath, row: dict[str, Any], encoded: int
) -> None:
    await path.index_all(path.publish("a", title="one", price=10.0))
    path.rows["a"] = replace(path.rows["a"], **row)
    report = await path.index_all(path.publish("a", title="one", price=8.0))
    assert (report.encoded, report.rewritten, path.encoder.encoded) == (encoded, 1 - encoded, 1 + encoded)
    assert (path.rows["a"].encoder_version, path.rows["a"].has_image) == (VERSION, False)


async def test_a_corrected_time_of_publication_is_kept_although_nothing_is_encoded(path: ItemPath) -> None:
    corrected = NOW - timedelta(days=30)
    await path.index_all(path.publish("a", title="one"))
    report = await path.index_all(path.publish("a", title="one", published_at=corrected.isoformat()))
    assert report.rewritten == 1
    assert path.rows["a"].published_at == corrected


async def test_a_worker_that_is_replaced_after_its_last_write_acknowledges_nothing(path: ItemPath) -> None:
    asked = 0

    async def guard() -> None:
        nonlocal asked
        asked += 1
        if path.outbox.announced:
            raise Fenced("gone")

    with pytest.raises(Fenced):
        await index_batch(path.context, [path.publish("a", title="one")], guard)
    assert set(path.rows) == {"a"}
    assert asked == 3  # before the write, the announcement, the acknowledgement


@pytest.mark.parametrize("batches", [1, 2, 3])
async def test_the_price_at_first_publish_does_not_depend_on_batching(path: ItemPath, batches: int) -> None:
    records = [
        path.publish("a", title="one", price=10.0),
        path.publish("a", title="two", price=9.0),
        path.publish("a", title="two", price=8.0),
    ]
    for part in np.array_split(np.arange(3), batches):
        await path.index_all(*(records[index] for index in part))
    assert (path.rows["a"].first_price, path.rows["a"].price) == (10.0, 8.0)
    assert set(path.encoder.prices) == {10.0}


async def test_an_item_that_comes_back_after_a_delete_has_a_new_first_price(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="one", price=10.0))
    await path.index_all(path.delete("a"), path.publish("a", title="one", price=4.0))
    assert path.rows["a"].first_price == 4.0
    assert path.encoder.prices == [10.0, 4.0]  # encoders may look at it, so the old vector will not do


async def test_an_older_event_changes_nothing_and_the_newer_row_is_announced_again(path: ItemPath) -> None:
    old_publish, old_delete = path.publish("a", title="old"), path.delete("a")
    await path.index_all(path.publish("a", title="new"))
    row = path.rows["a"]
    for late in (old_publish, old_delete):
        path.outbox.announced.clear()
        report = await path.index_all(late)
        assert path.rows["a"] is row
        assert report.stale == 1
        assert path.outbox.announced == [row]


async def test_a_topic_that_was_created_again_starts_over_without_being_taken_for_old(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="old world", offset=500))
    record = path.publish("a", title="new world", offset=0)
    await path.index_all(replace(record, timestamp_ms=record.timestamp_ms + 1_000_000))
    assert path.rows["a"].title == "new world"


async def test_taking_a_batch_twice_ends_in_the_same_state(path: ItemPath) -> None:
    path.web[PICTURE_URL] = picture("blue")
    batch = [
        path.publish("a", title="one", price=1.0),
        path.publish("b", title="two", image_url=PICTURE_URL),
        path.record("c", b"not json"),
        path.delete("d"),
    ]
    await path.index_all(*batch)
    first = {name: (row.title, row.vector.tolist(), row.source_offset) for name, row in path.on_sale.items()}
    await path.index_all(*batch)
    assert {name: (row.title, row.vector.tolist(), row.source_offset) for name, row in path.on_sale.items()} == first
    assert len({letter.letter_key for letter in path.dead_letters.letters}) == 1
    assert path.encoder.encoded == 2


class TestBadInput:
    BOMB = b"\x89PNG\r\n\x1a\n" + b"\0" * 50
    WITHOUT_ZONE, IN_FUTURE = "2026-01-01T00:00:00", "2099-01-01T00:00:00Z"

    @pytest.mark.parametrize(
        ("key", "value", "stage", "reason"),
        [
            ("bad", b"{not json", "decode", Reason.NOT_JSON),
            ("bad", b"", "decode", Reason.NOT_JSON),
            ("bad", b"[1, 2]", "decode", Reason.WRONG_TYPE),
            ("bad", item("bad", title=7), "decode", Reason.WRONG_TYPE),
            ("bad", item("bad", title="x", price=-1), "decode", Reason.WRONG_TYPE),
            ("bad", item("bad"), "decode", Reason.NO_CONTENT),
            ("bad", item("bad", title="  "), "decode", Reason.NO_CONTENT),
            ("bad", item("bad", title="x", schema_version=99), "decode", Reason.UNKNOWN_VERSION),
            ("bad", item("bad", title="x", published_at=WITHOUT_ZONE), "decode", Reason.TIMESTAMP_WITHOUT_ZONE),
            ("bad", item("bad", title="x", published_at=IN_FUTURE), "decode", Reason.TIMESTAMP_IN_FUTURE),
            ("bad", item("other", title="x"), "decode", Reason.KEY_MISMATCH),
            (None, item("bad", title="x"), "decode", Reason.NO_KEY),
            (b"\xff\xfe", item("bad", title="x"), "decode", Reason.KEY_MISMATCH),
            (b"", None, "decode", Reason.KEY_MISMATCH),
            ("bad", item("bad", title="x" * 150_000), "decode", Reason.TOO_LARGE),
            ("bad", item("bad", image=b64(picture()[:40])), "image", Reason.BAD_IMAGE),
            ("bad", item("bad", image=b64(BOMB)), "image", Reason.BAD_IMAGE),
        ],
    )
    async def test_a_bad_record_is_buried_with_its_bytes_and_its_neighbours_go_through(
        self, path: ItemPath, key: Any, value: Any, stage: str, reason: Reason
    ) -> None:
        bad = path.record(key, value, offset=5)
        before, after = path.publish("before", title="x", offset=4), path.publish("after", title="y", offset=6)
        report = await path.index_all(before, bad, after)
        assert set(path.on_sale) == {"before", "after"}
        (letter,) = path.dead_letters.letters
        assert (letter.stage, letter.reason) == (stage, reason)
        assert (letter.topic, letter.partition, letter.offset) == ("items", 0, 5)
        assert (letter.key, letter.value) == (bad.key, bad.value)
        assert report.dead_lettered == {(stage, reason.value): 1}

    async def test_a_bad_event_does_not_hide_the_good_one_before_it(self, path: ItemPath) -> None:
        report = await path.index_all(
            path.publish("a", title="good"),
            path.publish("a", image=b64(b"no picture")),
            path.publish("b", title="good"),
            path.delete("b"),
            path.publish("b", image=b64(b"no picture")),
            path.record("a", b"{"),
        )
        assert path.rows["a"].title == "good"
        assert "b" not in path.on_sale
        assert path.outbox.announced[-1] == "b"
        assert len(path.dead_letters.letters) == 3
        assert (report.events, report.superseded) == (6, 3)  # what cannot be decoded is of no item

    async def test_a_bad_update_leaves_the_row_of_the_last_good_event(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", title="good"))
        await path.index_all(path.publish("a", image=b64(b"no picture")))
        assert path.rows["a"].title == "good"

    async def test_a_damaged_picture_does_not_take_the_title_with_it(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", title="good", image=b64(b"no picture"), offset=4))
        row = path.rows["a"]
        assert (row.has_title, row.has_image) == (True, False)
        assert np.allclose(row.vector, path.encoder.of(title="good"))
        assert path.outbox.announced == [row]
        assert path.reasons == [("image", Reason.BAD_IMAGE, 4)]

    async def test_a_vector_that_is_no_vector_is_buried_alone(self) -> None:
        poison = CountingEncoder().prepare(ItemContent(title="poison"))

        class Broken(CountingEncoder):
            def encode(self, batch: Sequence[Prepared]) -> Any:
                vectors = super().encode(batch)
                for index, prepared in enumerate(batch):
                    if prepared.tokens == poison.tokens:
                        vectors[index] = np.nan
                return vectors

        path = ItemPath(encoder=Broken())
        records = [path.publish(f"i{n}", title="poison" if n == 3 else f"t{n}") for n in range(8)]
        report = await path.index_all(*records)
        assert set(path.on_sale) == {f"i{n}" for n in range(8)} - {"i3"}
        assert (report.encoded, len(report.written)) == (7, 7)
        assert path.reasons == [("write", Reason.BAD_VECTOR, 3)]
        assert len(path.outbox.announced) == 7

    async def test_a_platforms_own_field_names_are_mapped(self) -> None:
        path = ItemPath(IndexConfig(field_map={"item_id": "sku", "title": "names.0", "published_at": "t"}))
        await path.index_all(path.record("s1", {"sku": "s1", "names": ["shoe"], "t": "2026-01-01T00:00:00+02:00"}))
        assert path.rows["s1"].title == "shoe"


class TestHolding:
    async def test_a_center_that_is_away_is_waited_for_at_every_step(self) -> None:
        class Flaky(InMemoryItemIndex):
            """Away for the first two calls of each kind."""

            def __init__(self) -> None:
                super().__init__(encoder_version=VERSION, dim=DIM)
                self.calls: dict[str, int] = {}

            def hiccup(self, what: str) -> None:
                self.calls[what] = self.calls.get(what, 0) + 1
                if self.calls[what] <= 2:
                    raise StoreUnavailable("Milvus", what)

            async def fetch(
                self, item_ids: Sequence[str], *, pending: bool = False, fresh: bool = True
            ) -> dict[str, ItemRow]:
                self.hiccup("fetch")
                return await super().fetch(item_ids, pending=pending)

            async def upsert(self, rows: Sequence[ItemRow]) -> None:
                self.hiccup("upsert")
                await super().upsert(rows)

            async def delete(self, item_ids: Sequence[str]) -> None:
                self.hiccup("delete")
                await super().delete(item_ids)

        path = ItemPath(index=Flaky())
        await path.index_all(path.publish("a", title="x"), path.delete("b"))
        assert set(path.on_sale) == {"a"}
        assert path.encoder.encoded == 1

    async def test_a_broker_that_is_away_is_waited_for(self, path: ItemPath) -> None:
        announce, failures = path.outbox.announce, iter([True, True, False])

        async def flaky(held: Any, gone: Any) -> None:
            if next(failures):
                raise BrokerUnavailable("Kafka", "away")
            await announce(held, gone)

        path.outbox.announce = flaky  # type: ignore[method-assign]
        await path.index_all(path.publish("a", title="x"))
        assert path.outbox.announced == [path.rows["a"]]

    async def test_a_fenced_worker_does_not_repeat_what_somebody_else_wrote(self, path: ItemPath) -> None:
        old = path.publish("a", title="old")
        await path.index_all(path.publish("a", title="new"))

        async def fenced() -> None:
            raise Fenced("gone")

        with pytest.raises(Fenced):
            await index_batch(path.context, [old], fenced)
        assert len(path.outbox.announced) == 1

    async def test_a_fenced_worker_writes_and_announces_nothing(self, path: ItemPath) -> None:
        async def fenced() -> None:
            raise Fenced("gone")

        for record in (path.publish("a", title="x"), path.delete("a")):
            with pytest.raises(Fenced):
                await index_batch(path.context, [record], fenced)
        assert path.on_sale == {}
        assert path.outbox.announced == []

    async def test_a_slow_picture_never_holds_a_batch_beyond_the_budget(self) -> None:
        path = ItemPath(IndexConfig(fetch_budget_seconds=0.2))
        budgets: list[float | None] = []

        @asynccontextmanager
        async def slow(url: str, *, timeout_seconds: float | None = None) -> AsyncIterator[bytes]:
            budgets.append(timeout_seconds)
            await asyncio.sleep(timeout_seconds or 60)
            raise ContentUnavailable(url, "slow")
            yield b""

        path.context.__dict__["fetch"] = slow
        started = asyncio.get_running_loop().time()
        await path.index_all(*(path.publish(f"i{n}", title="x", image_url=PICTURE_URL) for n in range(64)))
        assert asyncio.get_running_loop().time() - started < 2.0
        assert set(budgets) == {0.2}
        assert len(path.rows) == len(path.outbox.retries) == 64


async def test_each_batch_leaves_one_line_in_the_log(path: ItemPath) -> None:
    with capture_logs() as lines:
        await path.index_all(path.publish("a", title="x"), path.record("b", b"{"), path.delete("c", partition=2))
    (line,) = [line for line in lines if line["event"] == "items.indexed"]
    assert (line["count"], line["encoded"], line["deleted"], line["dead_lettered"]) == (3, 1, 1, 1)
    assert line["partitions"] == [0, 2]


async def test_a_time_is_from_the_future_by_when_it_was_produced_whatever_the_workers_clock_says(
    path: ItemPath,
) -> None:
    path.now = NOW - timedelta(days=400)  # set back: what is fine by its producer stays fine
    await path.index_all(path.publish("good", title="a lamp"))
    path.now = NOW + timedelta(days=400)  # set forward: what was refused once is refused again
    ahead = (NOW + timedelta(days=2)).isoformat()
    await path.index_all(path.record("bad", item("bad", title="a lamp", published_at=ahead)))
    assert set(path.on_sale) == {"good"}
    assert path.reasons == [("decode", Reason.TIMESTAMP_IN_FUTURE, 1)]
    path = ItemPath(config=IndexConfig(max_ahead_seconds=3 * 86_400.0))
    await path.index_all(path.record("far", item("far", title="a lamp", published_at=ahead)))
    assert set(path.on_sale) == {"far"}


async def test_attributes_are_announced_and_a_number_of_them_is_not_encoded_again(path: ItemPath) -> None:
    fields: dict[str, Any] = {"title": "one", "year": 1999, "category": ""}
    once, again = {"colour": "red", "tags": ["x", "y"]}, {"colour": "red", "tags": ["x", "y"], "pages": 7}
    await path.index_all(path.publish("a", attributes=once, published_at_is="unknown", **fields))
    await path.index_all(path.publish("a", attributes=again, published_at_is="inferred", **fields))
    first, second = (as_embedding(row) for row in path.outbox.announced)
    assert (first.year, first.attributes) == (1999, once)
    assert (second.year, second.attributes, second.published_at_is) == (1999, again, "inferred")
    assert (first.published_at_is, first.category, path.encoder.encoded) == ("unknown", None, 1)
    await path.index_all(path.publish("a", attributes=again | {"colour": "blue"}, **fields))
    assert path.encoder.encoded == 2


async def test_outcomes_are_left_out_and_what_looks_like_one_is_reported_once(path: ItemPath) -> None:
    path = ItemPath(config=IndexConfig(outcomes=("sales",)))
    with capture_logs() as logs:
        for item_id in ("a", "b"):
            attributes = {"sales": 12, "avg_rating": 4.5, "colour": "red"}
            await path.index_all(path.publish(item_id, title="one", attributes=attributes))
    assert path.rows["a"].attributes == {"avg_rating": 4.5, "colour": "red"}
    warned = [entry["attribute"] for entry in logs if entry["log_level"] == "warning"]
    assert warned == ["avg_rating"]
