"""The cache of searches: what is one search, what is kept, and what is encoded once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from schemas.errors import EncodingFailed, Reason
from streams.serving.query_vectors import QueryVectors
from streams.serving.reports import SearchReport
from tests.factories.searches import PHOTO, Given, HeldEncoder, search_vector
from tests.factories.serving import open_bench
from tests.factories.waiting import until

__all__ = ["open_bench"]

Make = Callable[..., tuple[QueryVectors, HeldEncoder, list[Any]]]


@pytest.fixture(name="make")
async def make_vectors() -> AsyncIterator[Make]:
    pool = ThreadPoolExecutor(2)
    encoders = []

    def make(*, most_cached: int = 3, most_waiting: int = 8) -> tuple[QueryVectors, HeldEncoder, list[Any]]:
        encoder = HeldEncoder()
        encoders.append(encoder)
        reports: list[Any] = []
        limits = {"most_cached": most_cached, "most_waiting": most_waiting}
        return QueryVectors(Given(encoder), pool, on_report=reports.append, **limits), encoder, reports

    yield make
    for encoder in encoders:
        encoder.gate.set()
    pool.shutdown()


async def test_words_and_photo_together_name_a_search_and_blanks_do_not(make: Make) -> None:
    vectors, encoder, _ = make(most_cached=9)
    asked = [("red boot", None), (None, PHOTO), ("red boot", PHOTO), ("red boot", PHOTO + b" too")]
    for text, image in asked:
        np.testing.assert_array_equal(await vectors.get(text, image), search_vector(text, image))
    assert len(vectors) == len(encoder.encoded) == 4
    np.testing.assert_array_equal(await vectors.get("  red \n boot ", b""), search_vector("red boot"))
    assert len(encoder.encoded) == 4
    assert [content.image for content in encoder.encoded] == [None, PHOTO, PHOTO, PHOTO + b" too"]


async def test_the_searches_not_asked_for_longest_make_room(make: Make) -> None:
    vectors, encoder, reports = make(most_cached=2)
    for text in ("one", "two", "one", "three", "one", "two"):
        await vectors.get(text, None)
    assert [content.title for content in encoder.encoded] == ["one", "two", "three", "two"]
    assert [report.outcome for report in reports] == ["encoded", "encoded", "hit", "encoded", "hit", "encoded"]
    assert len(vectors) == 2 and max(report.cached for report in reports) == 2
    assert all((report.seconds is not None) == (report.outcome == "encoded") for report in reports)


async def test_what_is_kept_is_no_view_of_what_the_encoder_made(make: Make) -> None:
    vectors, _, _ = make()
    assert (await vectors.get("one", None)).base is None
    assert isinstance(vectors.begin("one", None), np.ndarray)


async def test_equal_searches_under_way_are_encoded_once_and_outlive_who_asked(make: Make) -> None:
    vectors, encoder, _ = make()
    encoder.gate.clear()
    asking = [asyncio.create_task(vectors.get(text, None)) for text in ("one", " one", "one ")]
    await until(lambda: encoder.encoded, every=0.01)
    asking[0].cancel()
    await asyncio.gather(asking[0], return_exceptions=True)
    encoder.gate.set()
    found = await asyncio.gather(*asking[1:])
    assert len(encoder.encoded) == 1 and found[0] is found[1]


async def test_one_that_nobody_waits_for_any_more_is_kept_all_the_same(make: Make) -> None:
    vectors, encoder, _ = make()
    encoder.gate.clear()
    asking = asyncio.create_task(vectors.get("one", None))
    await until(lambda: encoder.encoded, every=0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    encoder.gate.set()
    await until(lambda: len(vectors) == 1, every=0.01)


async def test_what_was_refused_is_tried_again_and_told(make: Make) -> None:
    vectors, encoder, reports = make()
    for _ in range(2):
        with pytest.raises(EncodingFailed, match="not a picture"):
            await vectors.get("one", b"no such thing")
    assert len(encoder.encoded) == 2 and len(vectors) == 0
    assert reports == [SearchReport("refused", 0)] * 2
    await vectors.get("one", PHOTO)
    assert len(vectors) == 1


async def test_a_fault_of_the_encoder_is_told_as_one_even_where_nobody_waits(make: Make) -> None:
    vectors, encoder, reports = make()

    def broken(batch: Any) -> Any:
        raise EncodingFailed(Reason.BAD_VECTOR, "no numbers")

    encoder.encode_queries = broken  # type: ignore[method-assign]
    assert isinstance(vectors.begin("one", None), asyncio.Task)
    await until(lambda: reports, every=0.01)
    assert [report.outcome for report in reports] == ["failed"]
    assert isinstance(vectors.begin("one", None), asyncio.Task)  # again


async def test_beyond_those_that_may_wait_a_score_gets_none_and_others_wait(make: Make) -> None:
    vectors, encoder, _ = make(most_waiting=1)
    encoder.gate.clear()
    assert vectors.begin("one", None) is vectors.begin(" one", None)
    assert vectors.begin("two", None) is None
    asking = asyncio.create_task(vectors.get("two", None))
    encoder.gate.set()
    np.testing.assert_array_equal(await asking, search_vector("two"))
