"""Reports become series; the metrics page of processes without HTTP; stopping."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from dataclasses import replace

import aiohttp
import pytest

from schemas.errors import Misconfigured
from streams.indexing.config import IndexReport, PartitioningReport, QueryReport, RetryReport
from streams.monitoring.config import MetricsConfig
from streams.monitoring.metrics import Metrics, MetricsRole, metrics_server
from streams.runtime.process import run_until_stopped
from streams.serving.reports import (
    CacheReport,
    DroppedConnection,
    ModelReport,
    RequestReport,
    SearchReport,
    StatesReport,
)
from streams.stores.histories.deleted_items import SweepReport
from streams.stores.histories.packed_history import RecordReport
from streams.training.reports import SkewReport, TrainReport
from trainer.networks.trees import TreesReport


def series(metrics: Metrics) -> dict[str, float]:
    """All series of a role, without buckets and moments of creation: `name{label}` to value, zeros left out."""
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if not sample.name.startswith("process_") and not sample.name.endswith(("_created", "_bucket")):
                found[sample.name + "".join(f"{{{label}}}" for label in sample.labels.values())] = sample.value
    return {name: pytest.approx(value) for name, value in found.items() if value}


def test_what_a_recorder_reports_adds_up_in_the_series_of_each_field() -> None:
    metrics = Metrics("record")
    for _ in range(2):
        metrics.record(
            RecordReport(
                3, 120, exposures=5, takes=2, duplicates=1, broken=7, erased=11, replayed=13, resume_from=4, seconds=0.2
            )
        )
        metrics.record(SweepReport(17, 19, 0.3))
    assert series(metrics) == {
        "mim_record_events_total{exposures}": 10,
        "mim_record_events_total{takes}": 4,
        "mim_record_events_total{duplicates}": 2,
        "mim_record_events_total{broken}": 14,
        "mim_record_events_total{erased}": 22,
        "mim_record_events_total{replayed}": 26,
        "mim_record_batch_seconds_count": 2,
        "mim_record_batch_seconds_sum": 0.4,
        "mim_record_next_offset{3}": 120,
        "mim_record_deleted_takes_total": 34,
        "mim_record_deleted_items": 19,
        "mim_record_sweep_seconds_count": 2,
        "mim_record_sweep_seconds_sum": 0.6,
    }


def test_what_an_index_worker_reports_adds_up_in_the_series_of_each_field() -> None:
    metrics = Metrics("index")
    counts = {"superseded": 2, "encoded": 3, "rewritten": 5, "pending": 7, "deleted": 11, "stale": 13}
    letters = {("decode", "not_json"): 19, ("image", "image_unavailable"): 23}
    for _ in range(2):
        report = IndexReport(
            events=99, **counts, image_retries=17, dead_lettered=letters, seconds=0.5, held_seconds=0.25
        )
        metrics.record(report)
        metrics.record(RetryReport("given_up", 8, {("image", "image_unavailable"): 1}))
        metrics.record(PartitioningReport(home=29, foreign=31))
        metrics.record(QueryReport(known=37, encoded=41, refused=43))
    metrics.record(RetryReport("fetched", 1, {}))
    assert series(metrics) == {
        **{f"mim_index_items_total{{{name}}}": 2 * count for name, count in counts.items()},
        "mim_index_items_total{image_retries}": 34,
        "mim_index_dead_letters_total{decode}{not_json}": 38,
        "mim_index_dead_letters_total{image}{image_unavailable}": 48,
        "mim_index_batch_seconds_count": 2,
        "mim_index_batch_seconds_sum": 1.0,
        "mim_index_held_seconds_total": 0.5,
        "mim_index_image_retries_total{given_up}": 2,
        "mim_index_image_retries_total{fetched}": 1,
        "mim_index_placed_total{home}": 58,
        "mim_index_placed_total{foreign}": 62,
        "mim_index_queries_total{known}": 74,
        "mim_index_queries_total{encoded}": 82,
        "mim_index_queries_total{refused}": 86,
    }


def test_what_a_server_reports_is_in_the_series_of_each_field_and_a_refused_release_changes_no_gauge() -> None:
    metrics = Metrics("serve")
    for _ in range(2):
        metrics.record(RequestReport("/v1/score", 200, 0.01))
        metrics.record(StatesReport(number=4, items=9, behind_seconds=0.25))
        metrics.record(CacheReport(hits=3, misses=2, absent=5, cached=7, behind_seconds=0.5))
    metrics.record(RequestReport("/v1/score", 503, 0.5))
    metrics.record(ModelReport("loaded", 6, rows_trained=60, seconds=0.25))
    metrics.record(ModelReport("loaded", 7, rows_trained=70, seconds=0.5))
    metrics.record(ModelReport("damaged", 8, rows_trained=80, seconds=9.0))
    metrics.record(DroppedConnection("slow_head"))
    for outcome in ("hit", "not_in_time", "hit"):
        metrics.record(SearchReport(outcome, cached=11))
    metrics.record(SearchReport("encoded", cached=12, seconds=0.125))
    assert series(metrics) == {
        "mim_http_request_seconds_count{/v1/score}{200}": 2,
        "mim_http_request_seconds_sum{/v1/score}{200}": 0.02,
        "mim_http_request_seconds_count{/v1/score}{503}": 1,
        "mim_http_request_seconds_sum{/v1/score}{503}": 0.5,
        "mim_model_loads_total{loaded}": 2,
        "mim_model_loads_total{damaged}": 1,
        "mim_model_release_number": 7,
        "mim_model_rows_trained": 70,
        "mim_model_load_seconds_count": 2,
        "mim_model_load_seconds_sum": 0.75,
        "mim_vector_lookups_total{cache}": 6,
        "mim_vector_lookups_total{milvus}": 4,
        "mim_vector_absent_total": 10,
        "mim_vector_cache_items": 7,
        "mim_vector_cache_behind_seconds": 0.5,
        "mim_states_number": 4,
        "mim_states_items": 9,
        "mim_states_behind_seconds": 0.25,
        "mim_http_dropped_connections_total{slow_head}": 1,
        "mim_query_searches_total{hit}": 2,
        "mim_query_searches_total{not_in_time}": 1,
        "mim_query_searches_total{encoded}": 1,
        "mim_query_cache_searches": 12,
        "mim_query_encode_seconds_count": 1,
        "mim_query_encode_seconds_sum": 0.125,
    }


def test_what_a_trainer_reports_is_in_the_series_of_each_field() -> None:
    metrics = Metrics("train")
    report = TrainReport(
        accounts={"received": 99, "trained": 2, "late": 3},
        kinds={"exposure": 5, "click": 7},
        late_by_partition={0: 11, 4: 13},
        corrected=17,
        upgraded=19,
        takes_too_late=23,
        steps=29,
        rows_trained=31,
        releases=37,
        refused=41,
        held=43,
        last_event_at=47,
        waiting_for=53,
        given_up=59,
        ids_forgotten=61,
        trees=TreesReport(trees=71, share=0.25, fits=73, fits_missed=79),
        open_transactions=67,
        prequential={"gauc": 0.6, "auc": None},
    )
    metrics.record(replace(report, steps=1, last_event_at=None, prequential={"gauc": 0.5}))
    metrics.record(report)
    metrics.record(replace(report, prequential={"gauc": None}))
    assert series(metrics) == {
        "mim_train_events{received}": 99,
        "mim_train_events{trained}": 2,
        "mim_train_events{late}": 3,
        "mim_train_accepted_events{exposure}": 5,
        "mim_train_accepted_events{click}": 7,
        "mim_train_late_events{0}": 11,
        "mim_train_late_events{4}": 13,
        "mim_train_corrected_rows{label}": 17,
        "mim_train_corrected_rows{kind}": 19,
        "mim_train_takes_too_late": 23,
        "mim_train_steps": 29,
        "mim_train_rows": 31,
        "mim_train_releases": 37,
        "mim_train_kept_back{refused}": 41,
        "mim_train_kept_back{held}": 43,
        "mim_train_last_event_timestamp_seconds": 47,
        "mim_train_waiting_items": 53,
        "mim_train_given_up_items": 59,
        "mim_train_forgotten_ids": 61,
        "mim_train_trees": 71,
        "mim_train_trees_share": 0.25,
        "mim_train_tree_fits{made}": 73,
        "mim_train_tree_fits{one_label}": 79,
        "mim_train_open_transactions": 67,
        "mim_train_prequential{gauc}": 0.6,
    }
    metrics.record(replace(report, last_event_at=None))
    assert "mim_train_last_event_timestamp_seconds" not in series(metrics)


def test_rows_that_were_compared_are_counted_and_the_share_is_that_of_the_newest() -> None:
    metrics = Metrics("train")
    for rows, differing in ((10, 3), (8, 2), (0, 0)):
        metrics.record(SkewReport(rows, differing))
        share = metrics.registry.get_sample_value("mim_train_skew_share")
        assert share == (differing / rows if rows else 0)
    counted = [
        metrics.registry.get_sample_value("mim_train_skew_rows_total", {"outcome": outcome})
        for outcome in ("equal", "differing")
    ]
    assert counted == [13, 5]


def test_a_figure_of_nought_is_one_and_a_moment_that_is_not_known_is_none_of_the_clock() -> None:
    metrics = Metrics("train")
    metrics.record(TrainReport(accounts={}, prequential={"gauc": 0.5}, updated_at=7.0))
    metrics.record(TrainReport(accounts={}, prequential={"gauc": 0.0}, updated_at=8.0))
    assert metrics.registry.get_sample_value("mim_train_prequential", {"metric": "gauc"}) == 0
    assert metrics.registry.get_sample_value("mim_train_last_event_timestamp_seconds") == 0


@pytest.mark.parametrize("port", [None, 0])
async def test_without_a_port_nothing_is_served(port: int | None) -> None:
    async with metrics_server(Metrics("train"), "no such host", port):
        pass


async def test_a_port_that_is_taken_is_told_with_its_option(unused_tcp_port: int) -> None:
    async with metrics_server(Metrics("record"), "127.0.0.1", unused_tcp_port):
        with pytest.raises(Misconfigured, match=f"--metrics-port {unused_tcp_port} on 127.0.0.1"):
            async with metrics_server(Metrics("train"), "127.0.0.1", unused_tcp_port):
                pass


async def test_only_the_address_that_is_set_shows_metrics_and_by_default_no_other_machine_sees_them(
    unused_tcp_port: int,
) -> None:
    assert MetricsConfig().host == "127.0.0.1"
    async with metrics_server(Metrics("index"), "127.0.0.2", unused_tcp_port), aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.2:{unused_tcp_port}/metrics") as answer:
            assert answer.status == 200
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"http://127.0.0.1:{unused_tcp_port}/metrics")


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
    serves = ("mim_http_", "mim_model_", "mim_vector_", "mim_states_", "mim_query_")
    names = set(re.findall(r"^# TYPE (\w+)", page, re.M))
    foreign = {name for name in names if not name.startswith((*own.get(role, serves), "process_"))}
    assert foreign == set() and len(names) > 5
    assert {"process_resident_memory_bytes", "process_open_fds"} <= names
