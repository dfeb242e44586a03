"""Pictures behind URLs: one that answers takes part at once, one that is late never wins over what is newer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from encoders.base import Prepared
from schemas.errors import BrokerUnavailable, Fenced, Reason, Unprocessable, WriteRejected
from schemas.items import ImageRetry
from streams.indexing.config import IndexConfig
from tests.factories.item_path import PICTURE_URL, ItemPath, allowed, b64, picture, retry_images


class TestPicturesByUrl:
    async def test_a_picture_that_answers_takes_part_at_once(self, path: ItemPath) -> None:
        path.web[PICTURE_URL] = picture("blue")
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
        assert np.allclose(path.rows["a"].vector, path.encoder.of(title="x", image=picture("blue")))
        assert path.outbox.retries == []

    async def test_one_that_does_not_leaves_the_title_and_a_retry(self, path: ItemPath) -> None:
        report = await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, offset=7))
        row = path.rows["a"]
        assert (row.has_title, row.has_image) == (True, False)
        assert np.allclose(row.vector, path.encoder.of(title="x"))
        (retry,) = path.outbox.retries
        assert (retry.source.partition, retry.source.offset, retry.attempt) == (0, 7, 1)
        assert retry.not_before > path.now
        assert report.image_retries == 1

    async def test_without_a_title_the_item_waits_unseen(self, path: ItemPath) -> None:
        report = await path.index_all(path.publish("a", image_url=PICTURE_URL))
        assert await path.index.fetch(["a"]) == {}
        assert path.rows["a"].is_pending
        assert path.outbox.announced == ["a"]
        assert report.pending == 1
        assert len(path.outbox.retries) == 1

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (Unprocessable(Reason.IMAGE_REFUSED, "inside"), Reason.IMAGE_REFUSED),
            (picture()[:40], Reason.BAD_IMAGE),
        ],
        ids=["refused", "broken"],
    )
    async def test_a_refused_or_broken_picture_behind_a_url_leaves_the_title_and_a_letter(
        self, path: ItemPath, answer: Any, reason: Reason
    ) -> None:
        path.web[PICTURE_URL] = answer
        pictured = {"image_url": PICTURE_URL}
        await path.index_all(path.publish("a", title="x", **pictured), path.publish("b", **pictured))
        assert set(path.on_sale) == {"a"} and not path.rows["a"].has_image
        assert path.reasons == [("image", reason, 0), ("image", reason, 1)]
        assert path.outbox.retries == []

    async def test_a_change_of_price_while_the_picture_is_awaited_keeps_asking_for_it(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, price=2.0))
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, price=1.0))
        assert [retry.source.offset for retry in path.outbox.retries] == [0, 1]
        path.web[PICTURE_URL] = picture()
        assert [(await path.retry()).outcome for _ in range(2)] == ["superseded", "written"]
        assert path.rows["a"].has_image
        assert path.rows["a"].first_price == 2.0

    async def test_an_empty_field_is_no_picture(self, path: ItemPath) -> None:
        path.web[PICTURE_URL] = picture()
        await path.index_all(path.publish("a", title="x", image=""))
        await path.index_all(path.publish("b", title="x", image="", image_url=PICTURE_URL))
        assert (path.rows["a"].has_image, path.rows["b"].has_image) == (False, True)
        assert path.reasons == []

    async def test_the_same_url_means_the_same_picture(self, path: ItemPath) -> None:
        path.web[PICTURE_URL] = picture()
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, price=2.0))
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, price=1.0))
        assert path.fetched == [PICTURE_URL]
        assert path.encoder.encoded == 1


class TestLatePictures:
    async def test_a_late_picture_completes_the_row(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, price=3.0, category="c"))
        path.web[PICTURE_URL] = picture("blue")
        assert (await path.retry()).outcome == "written"
        row = path.rows["a"]
        assert np.allclose(row.vector, path.encoder.of(title="x", category="c", image=picture("blue")))
        assert (row.has_title, row.has_image, row.price, row.category, row.source_offset) == (True, True, 3.0, "c", 0)
        assert path.outbox.announced[-1] is row

    async def test_an_item_of_a_picture_alone_appears_when_it_comes(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", image_url=PICTURE_URL))
        path.web[PICTURE_URL] = picture("blue")
        assert (await path.retry()).outcome == "written"
        assert set(await path.index.fetch(["a"])) == {"a"}
        assert path.outbox.announced == ["a", path.rows["a"]]

    @pytest.mark.parametrize("title", ["x", ""])
    async def test_a_delete_wins_over_a_late_picture(self, path: ItemPath, title: str) -> None:
        await path.index_all(path.publish("a", title=title, image_url=PICTURE_URL))
        await path.index_all(path.delete("a"))
        path.web[PICTURE_URL] = picture()
        assert (await path.retry()).outcome == "superseded"
        assert path.on_sale == {}
        assert path.fetched == [PICTURE_URL]  # by the batch; the retry saw in time that it is too late

    @pytest.mark.parametrize("title", ["x", ""])
    async def test_a_newer_publish_wins_over_a_late_picture(self, path: ItemPath, title: str) -> None:
        await path.index_all(path.publish("a", title=title, image_url=PICTURE_URL))
        await path.index_all(path.publish("a", title="newer", image=b64(picture("green"))))
        path.web[PICTURE_URL] = picture("blue")
        assert (await path.retry()).outcome == "superseded"
        assert np.allclose(path.rows["a"].vector, path.encoder.of(title="newer", image=picture("green")))

    @pytest.mark.parametrize("title", ["x", ""])
    async def test_deleted_and_published_again_is_a_newer_publish(self, path: ItemPath, title: str) -> None:
        await path.index_all(path.publish("a", title=title, image_url=PICTURE_URL))
        await path.index_all(path.delete("a"), path.publish("a", title=title, image_url=PICTURE_URL))
        path.web[PICTURE_URL] = picture()
        first, second = path.outbox.retries
        assert (await path.retry(first)).outcome == "superseded"
        assert (await path.retry(second)).outcome == "written"

    async def test_something_newer_that_comes_while_the_picture_is_fetched_wins(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
        path.web[PICTURE_URL] = picture()
        original = path.context.encoding.encode

        async def slow(batch: Sequence[Prepared]) -> Any:
            vectors = await original(batch)
            if not path.dead_letters.letters and len(batch) == 1 and batch[0].has_image:
                await path.index_all(path.delete("a"))
            return vectors

        path.context.encoding.encode = slow  # type: ignore[method-assign]
        assert (await path.retry()).outcome == "superseded"
        assert path.on_sale == {}

    async def test_it_is_tried_again_later_and_later_then_buried(self) -> None:
        path = ItemPath(IndexConfig(retry_initial_seconds=10, retry_factor=3, retry_max_attempts=4))
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
        waits = []
        for _ in range(3):
            waits.append((path.outbox.retries[0].not_before - path.now).total_seconds())
            report = await path.retry()
        assert waits == [10, 30, 90]
        assert report.outcome == "given_up"
        (letter,) = path.dead_letters.letters
        assert (letter.topic, letter.stage, letter.reason) == ("items-retry", "image", Reason.IMAGE_UNAVAILABLE)
        assert b"pictures.test" in (letter.value or b"")
        assert set(path.on_sale) == {"a"}  # the title's vector stays
        assert path.outbox.retries == []

    async def test_giving_up_an_item_of_a_picture_alone_gives_up_its_place(self) -> None:
        path = ItemPath(IndexConfig(retry_max_attempts=2))
        await path.index_all(path.publish("a", image_url=PICTURE_URL))
        assert (await path.retry()).outcome == "given_up"
        assert path.on_sale == {}

    @pytest.mark.parametrize("answer", [picture()[:40], Unprocessable(Reason.IMAGE_TOO_LARGE, "huge")])
    async def test_a_late_picture_that_is_no_use_is_buried_at_once(self, path: ItemPath, answer: Any) -> None:
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
        path.web[PICTURE_URL] = answer
        assert (await path.retry()).outcome == "given_up"
        assert len(path.dead_letters.letters) == 1
        assert not path.rows["a"].has_image

    async def test_a_retry_that_is_met_twice_writes_the_same_again(self, path: ItemPath) -> None:
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
        path.web[PICTURE_URL] = picture()
        (retry,) = path.outbox.retries
        assert [(await path.retry(retry)).outcome for _ in range(2)] == ["written", "written"]


class TestTogether:
    """What became of many late pictures is read, encoded and written in one go."""

    @pytest.fixture
    async def retries(self, path: ItemPath) -> list[ImageRetry]:
        """Retries of ten items, which are due."""
        urls = [f"{PICTURE_URL}?{n}" for n in range(10)]
        await path.index_all(*(path.publish(f"i{n}", title=f"t{n}", image_url=url) for n, url in enumerate(urls)))
        path.web |= {url: picture("blue") for url in urls}
        path.now = path.outbox.retries[0].not_before
        return path.outbox.retries[:]

    async def test_one_round_trip_each(self, path: ItemPath, retries: list[ImageRetry]) -> None:
        calls: list[tuple[str, int]] = []
        for owner, name in ((path.index, "fetch"), (path.index, "upsert"), (path.encoder, "encode")):
            original = getattr(owner, name)

            def noted(part: Any, original: Any = original, name: str = name, **more: Any) -> Any:
                calls.append((name, len(part)))
                return original(part, **more)

            setattr(owner, name, noted)
        announced = len(path.outbox.announced)
        reports = await retry_images(path.context, retries)
        assert [report.outcome for report in reports] == ["written"] * 10
        assert all(row.has_image for row in path.rows.values())
        encoded = [("encode", 5)] * 2  # in two threads
        assert calls == [("fetch", 10), *encoded, ("fetch", 10), ("upsert", 10)]
        assert len(path.outbox.announced) == announced + 10

    async def test_each_comes_to_its_own_end(self, path: ItemPath, retries: list[ImageRetry]) -> None:
        await path.index_all(path.delete("i1"))
        del path.web[f"{PICTURE_URL}?2"]
        path.web[f"{PICTURE_URL}?3"] = Unprocessable(Reason.IMAGE_REFUSED, "gone")
        path.web[f"{PICTURE_URL}?4"] = picture()[:40]
        path.outbox.retries.clear()
        outcomes = [report.outcome for report in await retry_images(path.context, retries)]
        assert outcomes == ["written", "superseded", "again", "given_up", "given_up", *["written"] * 5]
        assert [retry.item.item_id for retry in path.outbox.retries] == ["i2"]
        assert [letter.key for letter in path.dead_letters.letters] == [b"i3", b"i4"]
        assert [path.rows[f"i{n}"].has_image for n in (0, 2, 3, 4, 5)] == [True, False, False, False, True]

    async def test_a_record_that_is_met_twice_is_written_once(self, path: ItemPath, retries: list[ImageRetry]) -> None:
        written: list[Any] = []
        original = path.index.upsert

        async def noted(rows: Any) -> None:
            written.extend(rows)
            await original(rows)

        path.index.upsert = noted
        reports = await retry_images(path.context, [retries[0], retries[0]])
        assert [report.outcome for report in reports] == ["written", "written"]
        assert len(written) == 1

    async def test_a_vector_that_is_refused_costs_its_neighbours_nothing(
        self, path: ItemPath, retries: list[ImageRetry]
    ) -> None:
        original = path.index.upsert

        async def refusing(rows: Any) -> None:
            if any(row.item_id == "i3" for row in rows):
                raise WriteRejected(Reason.BAD_VECTOR, "not a vector")
            await original(rows)

        path.index.upsert = refusing
        outcomes = [report.outcome for report in await retry_images(path.context, retries)]
        assert outcomes == ["given_up" if n == 3 else "written" for n in range(10)]
        assert path.reasons == [("write", Reason.BAD_VECTOR, 3)]

    async def test_nothing_is_written_by_a_worker_that_was_replaced(
        self, path: ItemPath, retries: list[ImageRetry]
    ) -> None:
        async def fenced() -> None:
            raise Fenced("gone")

        with pytest.raises(Fenced):
            await retry_images(path.context, retries, fenced)
        assert not any(row.has_image for row in path.rows.values())


async def test_a_picture_that_was_given_up_does_not_come_back_by_a_record_that_is_met_twice() -> None:
    path = ItemPath(IndexConfig(retry_max_attempts=2))
    await path.index_all(path.publish("a", image_url=PICTURE_URL))
    (retry,) = path.outbox.retries
    assert (await path.retry(retry)).outcome == "given_up"
    path.web[PICTURE_URL] = picture()
    assert (await path.retry(retry)).outcome == "superseded"
    assert path.on_sale == {}


@pytest.mark.parametrize("change", [{"partition": 1}, {"offset": 1}])
async def test_a_row_of_another_record_does_not_wait_for_this_picture(path: ItemPath, change: dict[str, int]) -> None:
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    path.web[PICTURE_URL] = picture()
    (retry,) = path.outbox.retries
    other = retry.model_copy(update={"source": retry.source.model_copy(update=change)})
    assert (await path.retry(other)).outcome == "superseded"
    assert not path.rows["a"].has_image


@pytest.mark.parametrize("title", ["x", ""])
async def test_a_row_says_whether_its_vector_has_a_title(path: ItemPath, title: str) -> None:
    await path.index_all(path.publish("a", title=title, image_url=PICTURE_URL))
    path.web[PICTURE_URL] = picture()
    await path.retry()
    assert (path.rows["a"].has_title, path.rows["a"].has_image) == (bool(title), True)


class Replaced:
    """A worker whose link to Kafka is cut at its first message; `meanwhile` happens, and the link comes back."""

    def __init__(self, send: Callable[..., Awaitable[None]], meanwhile: Callable[[], Awaitable[None]]) -> None:
        self._send, self._meanwhile = send, meanwhile
        self.gone = False

    async def send(self, *messages: Any) -> None:
        if not self.gone:
            self.gone = True
            await self._meanwhile()
            raise BrokerUnavailable("Kafka", "cut off")
        await self._send(*messages)

    async def guard(self) -> None:
        if self.gone:
            raise Fenced("the partitions were handed out anew")


class TestAWorkerThatWasReplacedWhileItWasCutOff:
    @pytest.fixture
    async def retry(self, path: ItemPath) -> ImageRetry:
        """A retry that is due."""
        await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
        (retry,) = path.outbox.retries
        path.now = retry.not_before
        return retry

    async def test_it_announces_no_late_picture_after_the_delete(self, path: ItemPath, retry: ImageRetry) -> None:
        path.web[PICTURE_URL], announce = picture(), path.outbox.announce

        async def successor_deletes() -> None:
            await path.index.delete(["a"])
            await announce([], ["a"])

        worker = Replaced(announce, successor_deletes)
        path.outbox.announce = worker.send  # type: ignore[assignment,method-assign]
        with pytest.raises(Fenced):
            await retry_images(path.context, [retry], worker.guard)
        assert path.on_sale == {}
        assert path.outbox.announced[-1] == "a"

    async def test_it_sends_no_retry_that_its_successor_sent(self, path: ItemPath, retry: ImageRetry) -> None:
        worker = Replaced(path.outbox.retry_later, allowed)
        path.outbox.retry_later = worker.send  # type: ignore[assignment,method-assign]
        with pytest.raises(Fenced):
            await retry_images(path.context, [retry], worker.guard)
        assert path.outbox.retries == [retry]

    async def test_it_buries_nothing_that_its_successor_buried(self, path: ItemPath, retry: ImageRetry) -> None:
        path.web[PICTURE_URL] = picture()[:40]
        worker = Replaced(path.dead_letters.publish, allowed)
        path.dead_letters.publish = worker.send  # type: ignore[assignment,method-assign]
        with pytest.raises(Fenced):
            await retry_images(path.context, [retry], worker.guard)
        assert path.dead_letters.letters == []
