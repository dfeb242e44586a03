"""What the encoding benchmark makes of its measurements."""

from __future__ import annotations

import json
import time
from pathlib import Path

import aiohttp
import pytest

from schemas.errors import Misconfigured
from streams.bench.encode import Cell, summary, sweep_plan
from streams.bench.encode_content import read_content
from streams.bench.encode_limit import Limit
from streams.bench.encode_path import Batch, Measured, steady_rate, written
from streams.bench.picture_site import PictureSite
from tests.factories.offline_folders import START, write


def test_the_rate_leaves_out_the_start_and_the_time_after_the_first_worker_ran_dry() -> None:
    quick = [Batch(10.0, 8), Batch(20.0, 8), Batch(21.0, 8), Batch(22.0, 8)]
    slow = [Batch(11.0, 8), Batch(20.0, 8), Batch(22.0, 8), Batch(90.0, 8)]
    items, seconds, rate = steady_rate([quick, slow], 2)
    assert (items, seconds) == (24, 2.0)
    assert rate == pytest.approx(8.0 + 4.0)


def test_one_batch_after_the_start_counts_whole() -> None:
    assert steady_rate([[Batch(0.0, 5), Batch(1.0, 5), Batch(3.0, 4)]], 2) == (4, 2.0, 2.0)


def test_what_was_encoded_ahead_counts_neither_at_the_start_nor_at_the_end() -> None:
    # two batches lie encoded all along; the last two are only written, in no time
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.01, 7.02]
    items, took, rate = steady_rate([[Batch(second, 10) for second in seconds]], 1, 2)
    assert (items, took, rate) == (40, 4.0, 10.0)


def test_batches_are_read_from_the_log_of_a_worker() -> None:
    line = {
        "event": "items.indexed",
        "encoded": 7,
        "image_retries": 2,
        "count": 9,
        "timestamp": "2026-05-01T12:00:00.500000Z",
    }
    log = "\n".join(['{"event": "index.ready"}', json.dumps(line), "a line of another library"])
    assert written(log) == [Batch(1777636800.5, 7, 2)]


def test_the_sweep_asks_for_enough_batches_and_for_no_more_workers_than_cores() -> None:
    assert sweep_plan(1_024, 2) == [Cell(1, 16), Cell(1, 64), Cell(1, 128), Cell(2, 64)]
    assert sweep_plan(128, 2) == [Cell(1, 16)]
    assert sweep_plan(256, 1) == [Cell(1, 16)]
    assert sweep_plan(100, 8) == []


def test_the_ratio_is_the_best_cell_over_the_best_limit_before_and_after() -> None:
    cells = [Measured(1, 16, 40.0, 1, 9, 1.0), Measured(1, 64, 45.0, 2, 9, 1.0)]
    limits = [Limit(16, 1, 60.0, 1.0, 1.0), Limit(16, 2, 45.0, 1.0, 1.0), Limit(16, 1, 40.0, 1.0, 1.0)]
    found = summary(cells, limits, [], device="cpu")
    assert (found["items_per_second"], found["limit_items_per_second"], found["ratio_to_limit"]) == (45.0, 50.0, 0.9)
    assert (found["batch"], found["peak_memory_bytes"], found["limit_side_by_side"]) == (64, 2, 1)


async def test_the_site_is_as_slow_and_as_unreliable_as_it_says() -> None:
    content = read_content(None, 12)
    site = PictureSite(latency_seconds=0.05, error_share=0.5)
    async with site.serving(content) as records, aiohttp.ClientSession() as session:
        items = [json.loads(value) for _, value in records]
        assert not any("image" in item for item in items)
        started = time.monotonic()
        answers = [await session.get(items[n % 12]["image_url"]) for n in range(24)]
        assert time.monotonic() - started >= 24 * 0.05
        assert 4 <= sum(answer.status == 503 for answer in answers) <= 20
        for n, answer in enumerate(answers):
            if answer.status == 200:
                assert await answer.read() == content.items[n % 12].image


def test_content_is_distinct_items_with_pictures_and_the_same_every_time() -> None:
    content = read_content(None, 12)
    assert len({key for key, _ in content.records}) == len(content.items) == 12
    assert all(item.image and item.title for item in content.items)
    assert json.loads(content.records[3][1])["title"] == content.items[3].title
    assert read_content(None, 12).records == content.records


def test_a_set_that_is_too_small_is_named(tmp_path: Path) -> None:
    write(tmp_path, "items", item_id=["i"], title=["one"], publish_ts=[START])
    with pytest.raises(Misconfigured, match=r"--items 6: .* has 0 items with a picture"):
        read_content(tmp_path, 6)
