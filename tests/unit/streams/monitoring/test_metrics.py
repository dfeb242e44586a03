"""Reports become series; the metrics page of processes without HTTP; stopping."""

from __future__ import annotations

import asyncio
import os
import re
import signal

import aiohttp
import pytest

from schemas.errors import Misconfigured
from streams.indexing.config import IndexReport, RetryReport
from streams.monitoring.metrics import Metrics, MetricsRole, metrics_server
from streams.runtime.process import run_until_stopped
from streams.serving.reports import CacheReport, ModelReport, RequestReport
from streams.stores.histories.packed_history import RecordReport


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_recorded_batch_moves_its_counters() -> None:
    metrics = Metrics("record")
    for _ in range(2):
        metrics.record(RecordReport(3, 120, exposures=5, takes=2, duplicates=1, broken=1, seconds=0.2))
    assert value(metrics, "mim_record_events_total", outcome="exposures") == 10
    assert value(metrics, "mim_record_events_total", outcome="broken") == 2
    assert value(metrics, "mim_record_next_offset", partition="3") == 120
    assert value(metrics, "mim_record_batch_seconds_sum") == pytest.approx(0.4)


def test_an_indexed_batch_and_a_late_picture_move_theirs() -> None:
    metrics = Metrics("index")
    letters = {("decode", "not_json"): 2}
    counts = {"events": 9, "superseded": 1, "encoded": 4, "rewritten": 1, "pending": 0, "deleted": 1, "stale": 0}
    metrics.record(IndexReport(**counts, image_retries=0, dead_lettered=letters, seconds=0.5))
    metrics.record(RetryReport("given_up", 8, {("image", "image_unavailable"): 1}))
    assert value(metrics, "mim_index_items_total", outcome="encoded") == 4
    assert value(metrics, "mim_index_dead_letters_total", stage="decode", reason="not_json") == 2
    assert value(metrics, "mim_index_dead_letters_total", stage="image", reason="image_unavailable") == 1
    assert value(metrics, "mim_index_image_retries_total", outcome="given_up") == 1


def test_serving_reports_move_theirs() -> None:
    metrics = Metrics("serve")
    metrics.record(RequestReport("/v1/score", 200, 0.01))
    metrics.record(ModelReport("loaded", 7, rows_trained=70, seconds=0.1))
    metrics.record(ModelReport("damaged", 8))
    metrics.record(CacheReport(hits=3, misses=2, absent=1, cached=5, behind_seconds=0.5))
    assert value(metrics, "mim_http_request_seconds_count", route="/v1/score", status="200") == 1
    assert value(metrics, "mim_model_release_number") == 7
    assert value(metrics, "mim_model_loads_total", outcome="damaged") == 1
    assert value(metrics, "mim_vector_lookups_total", source="milvus") == 2
    assert value(metrics, "mim_vector_cache_behind_seconds") == 0.5


def test_a_report_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(KeyError):
        Metrics("record").record(object())


async def test_a_process_without_http_shows_its_metrics(unused_tcp_port: int) -> None:
    metrics = Metrics("record")
    async with metrics_server(metrics, "127.0.0.1", unused_tcp_port), aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{unused_tcp_port}/metrics") as answer:
            assert "mim_record_events_total" in await answer.text()
            assert answer.headers["Content-Type"].startswith("text/plain")
        with pytest.raises(Misconfigured, match=r"--metrics-port"):
            async with metrics_server(metrics, "127.0.0.1", unused_tcp_port):
                pass


async def test_work_is_told_to_stop_and_finishes_what_it_has() -> None:
    done: list[str] = []

    async def work(stop: asyncio.Event) -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await stop.wait()
        await asyncio.sleep(0.05)
        done.append("finished")

    await run_until_stopped(work)
    assert done == ["finished"]


async def test_work_that_waits_for_something_down_is_cancelled_after_the_grace_time() -> None:
    async def work(stop: asyncio.Event) -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    await asyncio.wait_for(run_until_stopped(work, grace_seconds=0.05), 5)


@pytest.mark.parametrize("when", ["at once", "while stopping"])
async def test_what_work_raises_comes_out(when: str) -> None:
    async def work(stop: asyncio.Event) -> None:
        if when == "while stopping":
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
            await stop.wait()
        raise Misconfigured("the reason")

    with pytest.raises(Misconfigured, match="the reason"):
        await run_until_stopped(work)


@pytest.mark.parametrize("role", ["index", "record", "train", "serve"])
def test_a_page_has_the_series_of_its_role_and_of_the_process_alone(role: MetricsRole) -> None:
    page = Metrics(role).page().decode()
    own = {"index": ("mim_index_",), "record": ("mim_record_",), "train": ("mim_train_",)}
    serves = ("mim_http_", "mim_model_", "mim_vector_")
    names = set(re.findall(r"^# TYPE (\w+)", page, re.M))
    foreign = {name for name in names if not name.startswith((*own.get(role, serves), "process_"))}
    assert foreign == set() and len(names) > 5
    assert {"process_resident_memory_bytes", "process_open_fds"} <= names
