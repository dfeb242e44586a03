"""Records of `items-retry`: which can be read, what an attempt asks for, and what is left of one that is given up."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from encoders.base import ItemContent, Prepared
from schemas.errors import Reason, Unprocessable
from schemas.letters import DeadLetter, RequeueHeaders
from streams.indexing.config import IndexConfig
from streams.indexing.image_retries import begin, due_in_seconds, load, settle
from streams.replay.broken_events import broken_item
from streams.stores.vectors.item_index import FOR_EVER
from tests.factories.item_path import NOW, PICTURE_URL, ItemPath, allowed, picture, retry_record

LONG_AGO = datetime(2026, 1, 2, tzinfo=UTC)
BEFORE = RequeueHeaders(b"items/3/7", 4, LONG_AGO)


@pytest.mark.parametrize("days", [0.0, 0.125, 364.0])
async def test_a_retry_is_due_when_its_time_has_come_however_far_ahead_that_is(path: ItemPath, days: float) -> None:
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    (retry,) = path.outbox.retries
    record = retry_record(retry.model_copy(update={"not_before": NOW + timedelta(days=days)}))
    assert due_in_seconds(path.context, record) == days * 86_400
    path.now += timedelta(days=400)
    assert due_in_seconds(path.context, record) == 0.0
    assert due_in_seconds(path.context, replace(record, value=b"{")) == 0.0


async def test_a_retry_of_the_largest_item_can_be_read(path: ItemPath) -> None:
    record = path.publish("a", title="x" * 400, image_url=PICTURE_URL)
    path.context = replace(path.context, max_record_bytes=len(record.value or b""))
    await path.index_all(record)
    path.web[PICTURE_URL] = picture()
    assert len(retry_record(path.outbox.retries[0]).value or b"") > path.context.max_record_bytes
    assert (await path.retry()).outcome == "written"


async def test_a_retry_without_an_address_is_given_up_with_its_reason(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    document = json.loads(retry_record(path.outbox.retries[0]).value or b"")
    document["item"]["image_url"] = None
    record = replace(retry_record(path.outbox.retries[0], 9), value=json.dumps(document).encode())
    attempts = await begin(path.context, [record])
    (report,) = await settle(path.context, [await load(path.context, one) for one in attempts], allowed)
    assert (report.outcome, report.dead_lettered) == ("given_up", {("decode", "no_content"): 1})
    assert path.reasons == [("decode", Reason.NO_CONTENT, 9)]


async def test_a_late_picture_is_given_its_own_time_and_the_price_at_first_publish(path: ItemPath) -> None:
    asked: list[float | None] = []
    fetch = path.context.fetch

    @asynccontextmanager
    async def noted(url: str, *, timeout_seconds: float | None = None) -> AsyncIterator[bytes]:
        asked.append(timeout_seconds)
        async with fetch(url, timeout_seconds=timeout_seconds) as found:
            yield found

    path.context.__dict__["fetch"] = noted
    await path.index_all(path.publish("a", title="old", price=2.0))
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL, price=1.0))
    path.web[PICTURE_URL] = picture()
    report = await path.retry()
    assert (report.outcome, report.attempt, path.encoder.prices[-1]) == ("written", 1, 2.0)
    assert asked == [path.config.fetch_budget_seconds, None]  # the second in the lane of late pictures


async def test_attempts_are_counted_and_the_last_one_told(path: ItemPath) -> None:
    path = ItemPath(IndexConfig(retry_max_attempts=3))
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    reports = [await path.retry(), await path.retry()]
    assert [(one.outcome, one.attempt, one.dead_lettered) for one in reports] == [
        ("again", 2, {}), ("given_up", 2, {("image", "image_unavailable"): 1}),
    ]  # fmt: skip
    (letter,) = path.dead_letters.letters
    assert (letter.detail.endswith("(3 attempts)"), letter.attempts) == (True, 2)


async def test_a_row_that_only_waited_gives_way_once_its_letter_is_stored(path: ItemPath) -> None:
    await path.index_all(path.publish("a", image_url=PICTURE_URL))
    path.web[PICTURE_URL] = Unprocessable(Reason.IMAGE_REFUSED, "no")
    publish, waiting = path.dead_letters.publish, []

    async def stored(letters: Sequence[DeadLetter]) -> None:
        waiting.append(path.rows["a"].is_pending)
        await publish(letters)

    path.dead_letters.publish = stored  # type: ignore[method-assign]
    assert (await path.retry()).outcome == "given_up"
    assert waiting == [True] and path.rows["a"].is_deleted


async def test_a_row_says_of_a_late_picture_too_whether_its_vector_has_a_title(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))
    path.rows["a"] = replace(path.rows["a"], has_title=False)  # as where its words alone could not be encoded
    path.web[PICTURE_URL] = picture()
    assert (await path.retry()).outcome == "written"
    assert (path.rows["a"].has_title, path.rows["a"].has_image) == (True, True)


@pytest.mark.parametrize("title", ["x", ""])
async def test_an_item_that_is_given_up_keeps_its_title_or_leaves_a_mark_in_its_place(title: str) -> None:
    path = ItemPath(IndexConfig(retry_max_attempts=2))
    await path.index_all(path.publish("a", title=title, image_url=PICTURE_URL, partition=3, offset=5, ms=8))
    before = path.rows["a"]
    await path.retry()
    row = path.rows["a"]
    if title:
        assert row is before
        return
    assert row.is_deleted and row.published_at == path.now + path.context.deletions_kept != FOR_EVER
    assert (row.source_partition, row.source_offset, row.produced_at_ms) == (3, 5, before.produced_at_ms)
    assert row.encoder_version == before.encoder_version


@pytest.mark.parametrize("requeued", [True, False])
@pytest.mark.parametrize("answer", [None, Unprocessable(Reason.IMAGE_REFUSED, "no")])
async def test_the_letter_of_a_late_picture_goes_on_from_the_letter_that_its_item_was_sent_again_from(
    requeued: bool, answer: Any
) -> None:
    path = ItemPath(IndexConfig(retry_max_attempts=2))
    record = path.publish("a", title="x", image_url=PICTURE_URL)
    await path.index_all(replace(record, headers=tuple(BEFORE.headers())) if requeued else record)
    if answer is not None:
        path.web[PICTURE_URL] = answer
    await path.retry()
    (letter,) = path.dead_letters.letters
    expected = ("items/3/7", 5, LONG_AGO) if requeued else (None, 1, None)
    assert (letter.requeued_from, letter.attempts, letter.first_failed_at) == expected


@pytest.mark.parametrize("kind", ["truncated-image", "bomb-image"])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("words", [{"title": "x"}, {"text": "a description"}, {}])
async def test_a_picture_that_is_no_use_costs_neither_title_nor_description(
    path: ItemPath, kind: str, late: bool, words: dict[str, Any]
) -> None:
    broken = broken_item(kind, 1, 1_000, NOW)
    content = base64.b64decode(json.loads(broken.value)["image"])
    if not late:
        path.web[PICTURE_URL] = content
    await path.index_all(path.publish("a", image_url=PICTURE_URL, **words))
    path.web[PICTURE_URL] = content
    if late:
        assert (await path.retry()).dead_lettered == {("image", broken.reason.value): 1}
    assert [(stage, reason) for stage, reason, _ in path.reasons] == [("image", broken.reason)]
    assert set(path.on_sale) == ({"a"} if words else set())
    if words:
        assert path.rows["a"].is_searchable and not path.rows["a"].has_image


async def test_a_picture_in_the_record_is_taken_before_one_behind_a_url(path: ItemPath) -> None:
    path.web[PICTURE_URL] = picture("blue")
    inside = base64.b64encode(picture("green")).decode()
    await path.index_all(path.publish("a", title="x", image=inside, image_url=PICTURE_URL))
    assert path.fetched == [] and (path.rows["a"].vector == path.encoder.of(title="x", image=picture("green"))).all()


async def test_a_late_picture_with_words_that_cannot_be_prepared_is_given_up_for_them(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="x", image_url=PICTURE_URL))

    def panics(content: ItemContent) -> Prepared:
        raise ValueError("the tokenizer panics")

    path.encoder.prepare = panics  # type: ignore[method-assign]
    path.web[PICTURE_URL] = picture()
    assert (await path.retry()).dead_lettered == {("encode", "encoder_failed"): 1}


@pytest.mark.parametrize("kind", ["not-json", "wrong-type", "no-content", "unknown-version", "no-zone", "far-future"])
async def test_items_that_are_broken_on_purpose_are_refused_by_the_worker_with_their_reason(
    path: ItemPath, kind: str
) -> None:
    broken = broken_item(kind, 1, 1_000_000_000, NOW)
    await path.index_all(path.record(broken.key, broken.value))
    assert path.reasons == [("decode", broken.reason, 0)]
