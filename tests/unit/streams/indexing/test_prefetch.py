"""Encoding ahead: the next batches are ready early, and nothing else changes."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from encoders.base import ItemContent, Prepared
from schemas.errors import ContentUnavailable, EncodingFailed, Reason, StoreUnavailable
from streams.indexing.config import IndexConfig
from streams.stores.vectors.item_index import ItemRow
from tests.factories.item_path import DIM, PICTURE_URL, CountingEncoder, ItemPath, item, picture
from tests.factories.running_agent import Running, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class PriceEncoder(CountingEncoder):
    """Looks at the price at first publish too, as trained encoders do."""

    def prepare(self, content: ItemContent) -> Prepared:
        return replace(super().prepare(content), price=content.price)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        rows = super().encode(batch)
        for row, one in zip(rows, batch, strict=True):
            row[:] = np.roll(row, 0 if one.price is None else 1 + int(one.price) % (len(row) - 1))
        return rows


def vector_of(title: str, price: float) -> NDArray[np.float32]:
    encoder = PriceEncoder()
    return encoder.encode([encoder.prepare(ItemContent(title=title, price=price))])[0]


class HeldWrites:
    """Lets a center's upserts through one at a time, on demand."""

    def __init__(self, path: ItemPath) -> None:
        self.waiting: list[list[str]] = []
        self.go_on = asyncio.Semaphore(0)
        self._upsert = path.index.upsert
        path.index.upsert = self.upsert

    def let_through(self, writes: int = 1) -> None:
        for _ in range(writes):
            self.go_on.release()

    async def upsert(self, rows: Sequence[ItemRow]) -> None:
        if rows:
            self.waiting.append([row.item_id for row in rows])
            await self.go_on.acquire()
        await self._upsert(rows)


async def put_numbered(run: Running, count: int) -> None:
    """Items i0, i1, ... with titles t0, t1, ..."""
    for n in range(count):
        await run.put(f"i{n}", item(f"i{n}", title=f"t{n}"), wait=False)


class Reads:
    """Counts the reads of rows: two of each batch, for the look ahead and in its turn."""

    def __init__(self, path: ItemPath) -> None:
        self._fetch = path.index.fetch
        self.count = 0
        path.index.fetch = self._noted

    async def _noted(self, *arguments: Any, **more: Any) -> Any:
        self.count += 1
        return await self._fetch(*arguments, **more)


def batches_of(size: int, *, ahead: int = 2) -> IndexConfig:
    return IndexConfig(batch_max_items=size, batch_within_seconds=1.0, batches_ahead=ahead)  # they are filled sooner


async def test_the_next_batches_are_encoded_while_one_is_written_and_none_is_acknowledged(tmp_path: Path) -> None:
    path = ItemPath(batches_of(2))
    held = HeldWrites(path)
    async with running("items", path, tmp_path) as run:
        await put_numbered(run, 6)
        await run.until(lambda: path.encoder.encoded == 6)
        assert held.waiting == [["i0", "i1"]]
        assert run.acked == []
        for done in (2, 4, 6):
            held.let_through()
            await run.until(lambda done=done: len(run.acked) == done)
    assert held.waiting == [["i0", "i1"], ["i2", "i3"], ["i4", "i5"]]
    assert run.acked == [(0, n) for n in range(6)]
    assert path.encoder.encoded == 6


async def test_a_fast_topic_waits_outside_when_the_writer_is_slow(tmp_path: Path) -> None:
    config = batches_of(4, ahead=2)
    path = ItemPath(config)
    held = HeldWrites(path)
    async with running("items", path, tmp_path) as run:
        await put_numbered(run, 200)
        await run.until(lambda: path.encoder.encoded >= 12)
        await asyncio.sleep(0.5)
        assert path.encoder.encoded == (config.batches_ahead + 1) * 4
        assert len(path.encoder.prices) == (config.batches_ahead + 1) * 4
        # one more batch has left the topic's buffer, for the moment when there is room
        left = run.unread
        assert 200 - left <= (config.batches_ahead + 2) * 4 + 1
        held.let_through(50)
        await run.until(lambda: len(run.acked) == 200)


async def test_a_slow_encoder_holds_back_a_fast_topic(tmp_path: Path) -> None:
    path = ItemPath(batches_of(4, ahead=1))
    go_on = threading.Event()
    encode = path.encoder.encode

    def slow(batch: Sequence[Prepared]) -> NDArray[np.float32]:
        go_on.wait(10)
        return encode(batch)

    path.encoder.encode = slow  # type: ignore[method-assign]
    async with running("items", path, tmp_path) as run:
        await put_numbered(run, 100)
        await run.until(lambda: len(path.encoder.prices) >= 8)
        await asyncio.sleep(0.2)
        assert len(path.encoder.prices) == 8
        go_on.set()
        await run.until(lambda: len(run.acked) == 100)
    assert len(path.rows) == 100


async def test_an_item_deleted_while_its_publish_is_being_written_stays_deleted(tmp_path: Path) -> None:
    path = ItemPath(batches_of(1))
    held, reads = HeldWrites(path), Reads(path)
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"), wait=False)
        await run.until(lambda: bool(held.waiting))
        await run.put("a", None, wait=False)
        await run.until(lambda: reads.count == 3)  # the second batch has looked ahead
        held.let_through(2)
        await run.until(lambda: len(run.acked) == 2)
    assert path.on_sale == {}
    assert path.outbox.announced[-1] == "a"


async def test_the_first_price_is_that_of_the_batch_before_which_was_not_yet_written(tmp_path: Path) -> None:
    path = ItemPath(batches_of(1), encoder=PriceEncoder())
    held, reads = HeldWrites(path), Reads(path)
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="old words", price=2.0), wait=False)
        await run.until(lambda: bool(held.waiting))
        await run.put("a", item("a", title="new words", price=5.0), wait=False)
        await run.until(lambda: reads.count == 3)
        held.let_through(2)
        await run.until(lambda: len(run.acked) == 2)
    row = path.rows["a"]
    assert (row.first_price, row.price) == (2.0, 5.0)
    assert np.allclose(row.vector, vector_of("new words", 2.0))


async def test_a_wrong_guess_of_the_price_is_put_right(tmp_path: Path) -> None:
    """Somebody else may have written between the look ahead and the turn of the batch."""
    path = ItemPath(batches_of(1), encoder=PriceEncoder())
    held = HeldWrites(path)
    async with running("items", path, tmp_path) as run:
        await run.put("other", item("other", title="y"), wait=False)
        await run.until(lambda: bool(held.waiting))
        await run.put("a", item("a", title="words", price=5.0), wait=False)
        await run.until(lambda: path.encoder.encoded == 2)
        original = ItemPath(encoder=PriceEncoder())
        await original.index_all(original.publish("a", title="before", price=2.0))
        path.rows["a"] = replace(original.rows["a"], source_partition=7)
        held.let_through(2)
        await run.until(lambda: len(run.acked) == 2)
    assert path.rows["a"].first_price == 2.0
    assert np.allclose(path.rows["a"].vector, vector_of("words", 2.0))


async def test_unchanged_content_is_neither_decoded_nor_encoded_again(tmp_path: Path) -> None:
    path = ItemPath(batches_of(1))
    held, reads = HeldWrites(path), Reads(path)
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x", price=1.0), wait=False)
        await run.until(lambda: bool(held.waiting))
        await run.put("a", item("a", title="x", price=2.0), wait=False)  # its row is not written yet
        await run.until(lambda: reads.count == 3)
        held.let_through(3)
        await run.until(lambda: len(run.acked) == 2)
        await run.put("a", item("a", title="x", price=3.0), wait=False)  # its row is there
        await run.until(lambda: len(run.acked) == 3)
    assert path.rows["a"].price == 3.0
    assert path.encoder.encoded == 1
    assert path.encoder.prices == [1.0]


async def test_a_broken_event_gives_way_to_the_earlier_one_of_its_batch(tmp_path: Path) -> None:
    path = ItemPath(batches_of(2))
    path.web[PICTURE_URL] = EncodingFailed(Reason.BAD_IMAGE, "no picture")
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="good"), wait=False)
        await run.put("a", item("a", image_url=PICTURE_URL), wait=False)
        await run.until(lambda: len(run.acked) == 2)
    assert path.rows["a"].title == "good"
    assert path.reasons == [("image", Reason.BAD_IMAGE, 1)]


async def test_a_picture_is_fetched_once_and_a_late_one_is_asked_for_once(tmp_path: Path) -> None:
    path = ItemPath(batches_of(1))
    path.web[PICTURE_URL] = ContentUnavailable(PICTURE_URL, "later")
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x", image_url=PICTURE_URL), wait=False)
        await run.until(lambda: len(run.acked) == 1)
    assert path.fetched == [PICTURE_URL]
    assert [retry.item.item_id for retry in path.outbox.retries] == ["a"]


async def test_one_item_that_cannot_be_encoded_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    path = ItemPath(batches_of(4))
    encode = path.encoder.encode

    def poisoned(batch: Sequence[Prepared]) -> NDArray[np.float32]:
        if any(one.tokens == poison.tokens for one in batch):
            raise EncodingFailed(Reason.BAD_VECTOR, "not finite")
        return encode(batch)

    poison = path.encoder.prepare(ItemContent(title="t2"))
    path.encoder.encode = poisoned  # type: ignore[method-assign]
    async with running("items", path, tmp_path) as run:
        await put_numbered(run, 4)
        await run.until(lambda: len(run.acked) == 4)
    assert set(path.on_sale) == {"i0", "i1", "i3"}
    assert path.reasons == [("encode", Reason.BAD_VECTOR, 2)]


async def test_a_center_that_is_away_is_waited_for(tmp_path: Path) -> None:
    path = ItemPath(batches_of(1))
    fetch, calls = path.index.fetch, 0

    async def away(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 5:
            raise StoreUnavailable("Milvus", "away")
        return await fetch(*arguments, **more)

    path.index.fetch = away
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"), wait=False)
        await run.until(lambda: len(run.acked) == 1)
    assert set(path.on_sale) == {"a"}


async def test_a_bug_in_loading_ahead_stops_the_worker_and_acknowledges_nothing(tmp_path: Path) -> None:
    path = ItemPath(batches_of(1))

    def broken(url: str, *, timeout_seconds: float | None = None) -> Any:
        raise ZeroDivisionError("a bug")

    path.context.__dict__["fetch"] = broken
    async with running("items", path, tmp_path) as run:
        for n in range(3):
            await run.put(f"i{n}", item(f"i{n}", title="x", image_url=PICTURE_URL), wait=False)
        await run.fails_with(ZeroDivisionError)
        await asyncio.sleep(0.2)
    assert run.acked == []
    assert path.on_sale == {}


async def test_batches_read_before_partitions_moved_are_dropped_whole(tmp_path: Path) -> None:
    """Not one of them may be acknowledged: Faust commits beyond the gap that the first one leaves."""
    path = ItemPath(batches_of(1))
    held = HeldWrites(path)
    async with running("items", path, tmp_path) as run:
        for n in range(3):
            await run.put(f"old{n}", item(f"old{n}", title="x"), wait=False)
        await run.until(lambda: path.encoder.encoded == 3)
        run.flow.partitions_moved()
        held.let_through()  # the write that was under way
        await run.put("new", item("new", title="x"), wait=False)
        await run.until(lambda: held.waiting[-1] == ["new"])
        held.let_through()
        await run.until(lambda: len(run.acked) == 1)
        assert not run.flow.failed.done()
    assert run.acked == [(0, 3)]
    assert held.waiting == [["old0"], ["new"]]
    assert [row if isinstance(row, str) else row.item_id for row in path.outbox.announced] == ["new"]


@pytest.mark.parametrize("seed", range(12))
async def test_any_interleaving_ends_as_one_batch_after_another_does(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = ItemPath(batches_of(3, ahead=3), encoder=PriceEncoder(), cache_items=draw.choice([0, 4]))
    for owner, name in ((path.index, "upsert"), (path.index, "delete"), (path.index, "fetch")):
        original = getattr(owner, name)

        async def late(*arguments: Any, original: Any = original, **more: Any) -> Any:
            before, after = (draw.choice([0, 0, 0.001, 0.01]) for _ in range(2))
            await asyncio.sleep(before)
            answer = await original(*arguments, **more)
            await asyncio.sleep(after)
            return answer

        setattr(owner, name, late)
    plain = ItemPath(encoder=PriceEncoder())
    async with running("items", path, tmp_path) as run:
        for _ in range(90):
            key = draw.choice("abcde")
            fate = draw.random()
            value: Any = item(key, title=draw.choice(["x", "y", "x y"]), price=float(draw.randrange(1, 6)))
            if fate < 0.2:
                value = None
            elif fate < 0.3:
                value = item(key, title="x", image="AAAA")  # carries what is no picture
            elif fate < 0.4:
                value = b"{"
            await run.put(key, value, wait=False)
            await plain.index_all(plain.record(key, value))
            if draw.random() < 0.2:
                await asyncio.sleep(0.01)
        await run.until(lambda: len(run.acked) == 90)
    assert run.acked == [(0, n) for n in range(90)]
    assert set(path.on_sale) == set(plain.on_sale)
    for key, expected in plain.on_sale.items():
        row = path.rows[key]
        assert (row.title, row.price, row.first_price) == (expected.title, expected.price, expected.first_price)
        assert row.source_offset == expected.source_offset
        assert np.allclose(row.vector, expected.vector)
    # nobody looks at a broken picture that a later event of the same batch replaces
    assert set(path.reasons) <= set(plain.reasons)
    assert [one for one in path.reasons if one[0] == "decode"] == [one for one in plain.reasons if one[0] == "decode"]


async def test_content_seen_a_moment_ago_is_not_encoded_under_another_id() -> None:
    path = ItemPath(encoder=PriceEncoder(), cache_items=100)
    await path.index_all(path.publish("a", title="same", price=1.0), path.publish("b", title="same", price=1.0))
    await path.index_all(path.publish("c", title="same", price=1.0))
    assert path.encoder.encoded == 1
    await path.index_all(path.publish("d", title="same", price=2.0))  # this encoder looks at the first price
    assert path.encoder.encoded == 2
    assert np.array_equal(path.rows["a"].vector, path.rows["c"].vector)
    assert not np.allclose(path.rows["a"].vector, path.rows["d"].vector)


async def test_the_cache_keeps_the_newest_and_no_more_than_it_may() -> None:
    path = ItemPath(cache_items=2)
    for title in ("one", "two", "one", "three", "one", "two"):
        await path.index_all(path.publish(f"{title} {path.offsets}", title=title))
    # "two" had to leave for "three", "one" was used since
    assert path.encoder.encoded == 4


async def test_a_kept_vector_is_no_part_of_what_the_encoder_gave_and_may_use_again() -> None:
    class Reusing(CountingEncoder):
        out = np.zeros((8, DIM), np.float32)

        def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
            self.out[: len(batch)] = super().encode(batch)
            return self.out[: len(batch)]

    path = ItemPath(encoder=Reusing(), cache_items=10)
    for item_id, title in (("a", "red shoe"), ("b", "blue lamp"), ("c", "red shoe")):
        await path.index_all(path.publish(item_id, title=title))
    assert path.encoder.encoded == 2
    for item_id, title in (("a", "red shoe"), ("c", "red shoe"), ("b", "blue lamp")):
        assert np.allclose(path.rows[item_id].vector, CountingEncoder().of(title=title)), item_id


async def test_a_picture_that_arrived_later_is_no_hit_of_the_cache() -> None:
    path = ItemPath(cache_items=10)
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    before = path.rows["a"].vector
    path.web[PICTURE_URL] = picture()
    await path.retry()
    assert path.encoder.encoded == 2
    assert not np.allclose(before, path.rows["a"].vector)
