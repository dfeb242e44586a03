"""The Faust agents themselves, on their local channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from schemas.errors import Fenced, StoreUnavailable
from streams.indexing import agents as item_streams
from streams.indexing.config import IndexConfig, IndexReport, RetryReport
from streams.indexing.flow import Flow, OrderedAcks
from tests.factories.item_path import PICTURE_URL, ItemPath, allowed, item, picture, retry_record
from tests.factories.running_agent import running
from tests.factories.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def stuck_at_the_write(path: ItemPath) -> asyncio.Event:
    """Let no write come to its end; the event says that one has begun."""
    entered = asyncio.Event()

    async def stuck(rows: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    path.index.upsert = stuck
    return entered


async def test_publish_update_and_delete_of_one_key_are_handled_in_order(path: ItemPath, tmp_path: Path) -> None:
    async with running("items", path, tmp_path) as run:
        for n in range(3):
            await run.put("a", item("a", title=f"t{n}"))
            await run.put("b", item("b", title=f"t{n}"))
        await run.put("b", None)
        await run.until(lambda: len(run.acked) == 7)
    assert set(path.on_sale) == {"a"}
    assert path.rows["a"].title == "t2"
    assert run.acked == [(0, n) for n in range(7)]


async def test_every_event_is_acknowledged_bad_and_superseded_ones_too(path: ItemPath, tmp_path: Path) -> None:
    async with running("items", path, tmp_path) as run:
        await run.put("a", b"{")
        await run.put(None, item("a", title="x"))
        await run.put("a", item("a", title="x"))
        await run.put("a", item("a", title="y"))
        await run.until(lambda: len(run.acked) == 4)
    assert len(path.dead_letters.letters) == 2
    assert path.rows["a"].title == "y"


async def test_nothing_is_acknowledged_before_it_is_written_and_announced(path: ItemPath, tmp_path: Path) -> None:
    steps: list[str] = []
    async with running("items", path, tmp_path) as run:
        for owner, name in ((path.index, "upsert"), (path.outbox, "announce")):
            original = getattr(owner, name)

            async def noted(*arguments: Any, original: Any = original, name: str = name) -> None:
                await asyncio.sleep(0.05)
                await original(*arguments)
                steps.append(f"{name}, {len(run.acked)} acknowledged")

            setattr(owner, name, noted)
        await run.put("a", item("a", title="x"))
        await run.until(lambda: len(run.acked) == 1)
    assert steps == ["upsert, 0 acknowledged", "announce, 0 acknowledged"]


async def test_a_batch_that_is_interrupted_before_the_write_is_not_acknowledged(path: ItemPath, tmp_path: Path) -> None:
    entered = stuck_at_the_write(path)
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"))
        await asyncio.wait_for(entered.wait(), 10)
    assert run.acked == []
    assert path.outbox.announced == []


async def test_an_unforeseen_error_stops_the_worker_and_acknowledges_nothing(path: ItemPath, tmp_path: Path) -> None:

    async def broken(rows: Any) -> None:
        raise ZeroDivisionError("a bug")

    path.index.upsert = broken
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"))
        await run.fails_with(ZeroDivisionError)
        await run.put("b", item("b", title="x"))
        await asyncio.sleep(0.5)
        assert run.acked == []


@pytest.mark.parametrize(("which", "step"), [("items", "decode_batch"), ("items-retry", "due_in_seconds")])
async def test_an_unforeseen_error_before_the_first_write_stops_the_worker_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, step: str
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(item_streams, step, broken)
    async with running(which, ItemPath(), tmp_path) as run:
        await run.put("a", item("a", title="x"), wait=False)
        await run.fails_with(ZeroDivisionError)
    assert run.acked == []


async def test_losing_the_slot_stops_the_worker_before_it_writes(path: ItemPath, tmp_path: Path) -> None:

    async def lost() -> None:
        raise Fenced("slot taken")

    async with running("items", path, tmp_path, check_role=lost) as run:
        await run.put("a", item("a", title="x"))
        await run.fails_with(Fenced)
    assert path.on_sale == {}
    assert run.acked == []


async def test_partitions_that_move_meanwhile_drop_the_batch_and_the_worker_goes_on(tmp_path: Path) -> None:
    path = ItemPath()
    moved: list[bool] = []
    original = path.index.fetch

    async with running("items", path, tmp_path) as run:

        async def fetch(*arguments: Any, **more: Any) -> Any:
            if not moved:
                moved.append(True)
                run.flow.partitions_moved()
            return await original(*arguments, **more)

        path.index.fetch = fetch
        await run.put("a", item("a", title="x"))
        await run.until(lambda: bool(moved))
        await asyncio.sleep(0.3)
        assert path.on_sale == {}
        assert run.acked == []
        await run.put("b", item("b", title="x"))
        await run.until(lambda: len(run.acked) == 1)
        assert set(path.on_sale) == {"b"}
        assert not run.flow.failed.done()


async def test_events_from_before_a_hand_over_are_left_to_be_read_again(path: ItemPath, tmp_path: Path) -> None:
    async with running("items", path, tmp_path, is_current=lambda event: event.message.offset >= 2) as run:
        for n in range(4):
            await run.put(f"i{n}", item(f"i{n}", title="x"))
        await run.until(lambda: len(run.acked) == 2)
    assert set(path.on_sale) == {"i2", "i3"}


async def test_a_clean_stop_finishes_what_is_in_hand_and_takes_on_nothing_new(path: ItemPath, tmp_path: Path) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()
    original = path.index.upsert

    async def slow(rows: Any) -> None:
        entered.set()
        await go_on.wait()
        await original(rows)

    path.index.upsert = slow
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"))
        await entered.wait()
        draining = asyncio.create_task(run.flow.drain(5))
        await run.put("b", item("b", title="x"))
        await asyncio.sleep(0.1)
        assert not draining.done()
        go_on.set()
        assert await draining
        await asyncio.sleep(0.5)
    assert set(path.on_sale) == {"a"}
    assert len(run.acked) == 1


async def test_a_stop_does_not_wait_for_ever(path: ItemPath, tmp_path: Path) -> None:
    entered = stuck_at_the_write(path)
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"))
        await asyncio.wait_for(entered.wait(), 10)
        assert not await run.flow.drain(0.1)


async def test_a_late_picture_waits_until_it_is_due_and_holds_up_no_other(tmp_path: Path) -> None:
    path = ItemPath(IndexConfig(retry_initial_seconds=60))
    await path.index_all(
        path.publish("slow", title="x", image_url=PICTURE_URL), path.publish("quick", title="y", image_url=PICTURE_URL)
    )
    path.web[PICTURE_URL] = picture()
    slow, quick = path.outbox.retries
    path.now = quick.not_before
    slow = slow.model_copy(update={"not_before": path.now + timedelta(seconds=60)})
    async with running("items-retry", path, tmp_path) as run:
        for retry in (slow, quick):
            await run.put(retry.item.item_id, retry_record(retry).value)
        await run.until(lambda: path.rows["quick"].has_image)
        assert not path.rows["slow"].has_image
        assert run.acked == []  # the first in line is still waiting
        path.now = slow.not_before
        await run.until(lambda: len(run.acked) == 2)
    assert path.rows["slow"].has_image
    assert run.acked == [(0, 0), (0, 1)]
    assert [type(report) for report in run.reports] == [RetryReport, RetryReport]


async def test_late_pictures_that_gather_meanwhile_are_written_together_and_acknowledged_in_order(
    tmp_path: Path,
) -> None:
    path = ItemPath()
    await path.index_all(*(path.publish(f"i{n}", title="x", image_url=PICTURE_URL) for n in range(20)))
    path.web[PICTURE_URL] = picture()
    path.now = path.outbox.retries[0].not_before
    original, go_on, written = path.index.upsert, asyncio.Event(), list[int]()

    async def slow(rows: Any) -> None:
        await go_on.wait()
        await original(rows)
        written.append(len(rows))

    path.index.upsert = slow
    async with running("items-retry", path, tmp_path) as run:
        for retry in path.outbox.retries:
            await run.put(retry.item.item_id, retry_record(retry).value)
        await run.until(lambda: len(path.fetched) == 40)
        assert run.acked == []
        go_on.set()
        await run.until(lambda: len(run.acked) == 20)
    assert run.acked == [(0, n) for n in range(20)]
    assert sum(written) == 20 and len(written) < 10


async def test_more_late_pictures_than_may_wait_come_to_their_turn(tmp_path: Path) -> None:
    path = ItemPath(IndexConfig(retry_max_waiting=2))
    await path.index_all(*(path.publish(f"i{n}", title="x", image_url=PICTURE_URL) for n in range(7)))
    path.web[PICTURE_URL] = picture()
    path.now = path.outbox.retries[0].not_before
    async with running("items-retry", path, tmp_path) as run:
        for retry in path.outbox.retries:
            await run.put(retry.item.item_id, retry_record(retry).value, wait=False)
        await asyncio.wait_for(run.until(lambda: len(run.acked) == 7), 20)


async def test_late_pictures_from_before_a_hand_over_are_left_to_be_read_again(tmp_path: Path) -> None:
    path = ItemPath()
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    path.web[PICTURE_URL] = picture()
    (retry,) = path.outbox.retries
    path.now = retry.not_before
    moved: list[bool] = []
    fetch = path.context.fetch

    def moving(*arguments: Any, **more: Any) -> Any:
        moved.append(True)  # while the picture is fetched
        return fetch(*arguments, **more)

    path.context.__dict__["fetch"] = moving
    async with running("items-retry", path, tmp_path, is_current=lambda event: not moved) as run:
        await run.put("a", retry_record(retry).value)
        await run.until(lambda: bool(moved))
        await asyncio.sleep(0.2)
        assert run.acked == [] and not run.flow.failed.done()
    assert not path.rows["a"].has_image


async def test_a_retry_that_cannot_be_read_is_buried_and_acknowledged(path: ItemPath, tmp_path: Path) -> None:
    async with running("items-retry", path, tmp_path) as run:
        await run.put("a", b"{")
        await run.put("a", None)
        await run.until(lambda: len(run.acked) == 2)
    assert [letter.topic for letter in path.dead_letters.letters] == ["items-retry"] * 2


async def test_batches_report_what_became_of_them(path: ItemPath, tmp_path: Path) -> None:
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="x"))
        await run.until(lambda: len(run.reports) == 1)
    (report,) = run.reports
    assert isinstance(report, IndexReport)
    assert report.encoded == 1


async def test_marks_whose_time_is_over_are_forgotten_every_hour_and_later_where_the_center_is_away(
    path: ItemPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_streams, "_DUE_EVERY_SECONDS", 0.01)
    forget, moments = path.index.forget_deleted, list[datetime]()
    away = True

    async def noted(moment: datetime) -> None:
        moments.append(moment)
        if away:
            raise StoreUnavailable("Milvus", "away")
        await forget(moment)

    path.index.forget_deleted = noted
    await path.index_all(path.delete("a"))
    path.now = start = path.now + timedelta(days=8)
    async with running("items", path, tmp_path) as run:
        await run.until(lambda: len(moments) == 1)
        away, path.now = False, start + timedelta(minutes=59)
        await asyncio.sleep(0.1)
        assert (moments, set(path.rows)) == ([start], {"a"})
        path.now = start + timedelta(hours=1)
        await run.until(lambda: not path.rows)
        await asyncio.sleep(0.1)
        assert not run.flow.failed.done()
    assert moments == [start, start + timedelta(hours=1)]


async def test_a_worker_that_lost_its_slot_forgets_no_marks(
    path: ItemPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_streams, "_DUE_EVERY_SECONDS", 0.01)

    async def lost() -> None:
        raise Fenced("slot taken")

    await path.index_all(path.delete("a"))
    path.now += timedelta(days=8)
    async with running("items", path, tmp_path, check_role=lost) as run:
        await run.fails_with(Fenced)
    assert set(path.rows) == {"a"}


class Message(NamedTuple):
    partition: int
    offset: int
    generation_id: int
    value: bytes | None
    key: bytes | None = b"a"
    timestamp: float = 1_767_225_600.123
    headers: Any = None


class Event(NamedTuple):
    message: Message


@pytest.mark.parametrize("headers", [None, [("h", b"1")], {"h": b"1"}, [("h", b"1"), ("h", None)]])
def test_an_event_of_faust_is_a_record_with_its_time_to_the_millisecond(headers: Any) -> None:
    event: Any = Event(Message(2, 9, 1, b"v", headers=headers))
    record = item_streams.as_record(event, "items")
    assert (record.topic, record.partition, record.offset, record.key, record.value) == ("items", 2, 9, b"a", b"v")
    assert record.timestamp_ms == 1_767_225_600_123
    assert record.headers == tuple(headers.items() if isinstance(headers, dict) else headers or ())


async def test_a_late_picture_of_an_earlier_assignment_holds_no_acknowledgement_of_this_one_up(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    path.web[PICTURE_URL] = picture()
    (due,) = path.outbox.retries
    path.now = due.not_before
    waiting = due.model_copy(update={"not_before": path.now + timedelta(hours=1)})
    acked: list[tuple[int, int]] = []

    class Stream:
        async def noack_take(self, most: int, within: float) -> AsyncIterator[list[Event]]:
            yield [Event(Message(0, 7, 1, retry_record(waiting).value))]
            yield [Event(Message(0, 7, 2, retry_record(due).value)), Event(Message(0, 8, 2, b"{"))]
            await asyncio.Event().wait()

        async def ack(self, event: Event) -> None:
            acked.append((event.message.generation_id, event.message.offset))

    stream: Any = Stream()
    pool = item_streams.ImageRetryPool(
        path.context, Flow(check_role=allowed), lambda event: True, lambda report: None, asyncio.sleep, stream
    )
    reading = asyncio.create_task(pool.run())
    await until(lambda: acked == [(2, 7), (2, 8)], seconds=10, every=0.01)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()


async def test_acknowledgements_keep_the_order_of_arrival() -> None:
    acked: list[int] = []

    async def ack(event: int) -> None:
        await asyncio.sleep(0)
        acked.append(event)

    acks: OrderedAcks[int] = OrderedAcks(ack)
    done = [acks.arrived("p", n) for n in range(4)]
    other = acks.arrived("q", 10)
    await done[2]()
    await done[1]()
    assert acked == []
    await other()
    assert acked == [10]
    await asyncio.gather(done[0](), done[3]())
    assert acked == [10, 0, 1, 2, 3]
