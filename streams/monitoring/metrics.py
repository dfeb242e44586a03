"""All use of Prometheus. Components return frozen reports; `Metrics.record` turns them into series.

Base units in names, labels from small closed sets, never an id.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Literal

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from schemas.errors import Misconfigured
from streams.indexing.config import IndexReport, PartitioningReport, QueryReport, RetryReport
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

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


MetricsRole = Literal["record", "serve", "index", "train"]


class Metrics:
    """All series of a process in one registry: its role's, and those of any process (memory, CPU, open files)."""

    def __init__(self, role: MetricsRole) -> None:
        self.registry = CollectorRegistry()
        self._handlers: dict[type, Callable[[Any], None]] = {}
        declare: dict[MetricsRole, Callable[[], None]] = {
            "record": self._declare_record,
            "serve": self._declare_serve,
            "index": self._declare_index,
            "train": self._declare_train,
        }
        declare[role]()
        ProcessCollector(registry=self.registry)

    def record(self, report: object) -> None:
        """Count what a component reports. Raises `KeyError` for a type without a handler."""
        self._handlers[type(report)](report)

    def page(self) -> bytes:
        """Render the text that Prometheus reads."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=_SECONDS)

    def _declare_record(self) -> None:
        events = self._counter("mim_record_events_total", "Records of behaviours by what became of them", "outcome")
        batches = self._seconds("mim_record_batch_seconds", "Decoding and writing one batch of a partition")
        position = self._gauge("mim_record_next_offset", "Next offset to record", "partition")
        outcomes = ("exposures", "takes", "duplicates", "broken", "erased", "replayed")
        for outcome in outcomes:
            events.labels(outcome)

        def handle(report: RecordReport) -> None:
            for outcome in outcomes:
                events.labels(outcome).inc(getattr(report, outcome))
            batches.observe(report.seconds)
            position.labels(report.partition).set(report.next_offset)

        removed = self._counter("mim_record_deleted_takes_total", "Takes removed because their item was deleted")
        remembered = self._gauge("mim_record_deleted_items", "Deleted items that sweeps of the takes look for")
        sweeps = self._seconds("mim_record_sweep_seconds", "Looking through all users for takes of deleted items")

        def on_sweep(report: SweepReport) -> None:
            removed.inc(report.removed)
            remembered.set(report.remembered)
            sweeps.observe(report.seconds)

        self._handlers |= {RecordReport: handle, SweepReport: on_sweep}

    def _declare_index(self) -> None:
        events = self._counter("mim_index_items_total", "Events of items by what became of them", "outcome")
        letters = self._counter("mim_index_dead_letters_total", "Dead letters of the item path", "stage", "reason")
        batches = self._seconds("mim_index_batch_seconds", "Decoding, encoding and writing one batch of items")
        held = self._counter("mim_index_held_seconds_total", "Time that partitions waited for something away")
        retries = self._counter("mim_index_image_retries_total", "Late pictures by what became of them", "outcome")
        outcomes = ("superseded", "encoded", "rewritten", "pending", "deleted", "stale", "image_retries")
        for outcome in outcomes:
            events.labels(outcome)

        placed = self._counter(
            "mim_index_placed_total",
            "Records of items by whether they lie where murmur2 of their key puts them (home) or not (foreign)",
            "partition",
        )
        for where in ("home", "foreign"):
            placed.labels(where)

        def count_letters(report: IndexReport | RetryReport) -> None:
            for (stage, reason), number in report.dead_lettered.items():
                letters.labels(stage, reason).inc(number)

        def on_batch(report: IndexReport) -> None:
            for outcome in outcomes:
                events.labels(outcome).inc(getattr(report, outcome))
            count_letters(report)
            batches.observe(report.seconds)
            held.inc(report.held_seconds)

        def on_retry(report: RetryReport) -> None:
            retries.labels(report.outcome).inc()
            count_letters(report)

        def on_partitioning(report: PartitioningReport) -> None:
            placed.labels("home").inc(report.home)
            placed.labels("foreign").inc(report.foreign)

        searched = self._counter("mim_index_queries_total", "Searches in behaviours by what became of them", "outcome")
        for outcome in ("known", "encoded", "refused"):
            searched.labels(outcome)

        def on_queries(report: QueryReport) -> None:
            searched.labels("known").inc(report.known)
            searched.labels("encoded").inc(report.encoded)
            searched.labels("refused").inc(report.refused)

        self._handlers |= {IndexReport: on_batch, RetryReport: on_retry, PartitioningReport: on_partitioning}
        self._handlers[QueryReport] = on_queries

    def _declare_serve(self) -> None:
        requests = self._seconds("mim_http_request_seconds", "HTTP requests", "route", "status")
        loads = self._counter("mim_model_loads_total", "Attempts to take up a release", "outcome")
        number = self._gauge("mim_model_release_number", "Running number of the release that answers")
        trained = self._gauge("mim_model_rows_trained", "Impressions that this release learned from")
        load_seconds = self._seconds("mim_model_load_seconds", "Loading and checking a release")
        lookups = self._counter("mim_vector_lookups_total", "Vectors asked for, by where they came from", "source")
        cached, read = lookups.labels("cache"), lookups.labels("milvus")
        absent = self._counter("mim_vector_absent_total", "Vectors asked for that the center does not hold")
        size = self._gauge("mim_vector_cache_items", "Vectors in the process's cache")
        behind = self._gauge("mim_vector_cache_behind_seconds", "Time since the cache was last known to be true")

        written = self._gauge("mim_states_number", "Running number of the trainer's write that scores rest on")
        states = self._gauge("mim_states_items", "Items of which is known how they were taken")
        unsure = self._gauge("mim_states_behind_seconds", "Time since nothing newer was last known to be written")
        dropped = self._counter("mim_http_dropped_connections_total", "Connections that the server closed", "reason")

        queries = self._counter(
            "mim_query_searches_total", "Searches and their encodings by what became of them", "outcome"
        )
        query_cache = self._gauge("mim_query_cache_searches", "Searches whose vectors are kept")
        query_seconds = self._seconds("mim_query_encode_seconds", "Encoding one search, with the wait for a thread")
        for outcome in ("hit", "shared", "encoded", "not_in_time", "refused", "failed"):
            queries.labels(outcome)

        labelled = cache(requests.labels)  # as many as there are routes and statuses

        def on_request(report: RequestReport) -> None:
            labelled(report.route, report.status).observe(report.seconds)

        def on_model(report: ModelReport) -> None:
            loads.labels(report.outcome).inc()
            if report.outcome == "loaded":
                number.set(report.number)
                trained.set(report.rows_trained)
                load_seconds.observe(report.seconds)

        def on_cache(report: CacheReport) -> None:
            cached.inc(report.hits)
            read.inc(report.misses)
            absent.inc(report.absent)
            size.set(report.cached)
            behind.set(report.behind_seconds)

        def on_states(report: StatesReport) -> None:
            written.set(report.number)
            states.set(report.items)
            unsure.set(report.behind_seconds)

        def on_query(report: SearchReport) -> None:
            queries.labels(report.outcome).inc()
            query_cache.set(report.cached)
            if report.seconds is not None:
                query_seconds.observe(report.seconds)

        def on_dropped(report: DroppedConnection) -> None:
            dropped.labels(report.reason).inc()

        self._handlers |= {
            RequestReport: on_request,
            ModelReport: on_model,
            CacheReport: on_cache,
            StatesReport: on_states,
            SearchReport: on_query,
            DroppedConnection: on_dropped,
        }

    def _declare_train(self) -> None:
        events = self._gauge("mim_train_events", "Behaviours read by what became of them", "outcome")
        steps = self._gauge("mim_train_steps", "Optimiser steps since the start of the process")
        rows = self._gauge("mim_train_rows", "Impressions learned from since the start of the process")
        releases = self._gauge("mim_train_releases", "Releases made by this process that became current")
        kept_back = self._gauge("mim_train_kept_back", "Candidates that did not become current, by why", "why")
        waiting = self._gauge("mim_train_waiting_items", "Items whose vector the head of the stream waits for")
        given_up = self._gauge("mim_train_given_up_items", "Items whose vector was not waited for any longer")
        corrected = self._gauge("mim_train_corrected_rows", "Rows that a late take has corrected, by what", "what")
        takes = self._gauge("mim_train_takes", "Takes learned, a purchase as cart and click too", "kind", "when")
        too_late = self._gauge("mim_train_takes_too_late", "Takes that come too late for the exposure that they name")
        transactions = self._gauge("mim_train_open_transactions", "Partitions held up by a producer's transaction")
        forgotten_ids = self._gauge("mim_train_forgotten_ids", "Event ids forgotten early for want of memory")
        kinds = self._gauge("mim_train_accepted_events", "Behaviours accepted, by kind", "kind")
        late = self._gauge("mim_train_late_events", "Behaviours that came too late, by partition", "partition")
        trees = self._gauge("mim_train_trees", "Boosted trees beside the network")
        trees_share = self._gauge("mim_train_trees_share", "Weight of their logit beside the network's")
        tree_fits = self._gauge("mim_train_tree_fits", "Fits of trees that were due in this process", "outcome")
        event_time = self._gauge("mim_train_last_event_timestamp_seconds", "Event time of the last trained row")
        metric = self._gauge("mim_train_prequential", "Running prequential metrics at the newest release", "metric")

        def handle(report: TrainReport) -> None:
            for outcome, count in report.accounts.items():
                events.labels(outcome).set(count)
            steps.set(report.steps)
            rows.set(report.rows_trained)
            releases.set(report.releases)
            kept_back.labels("refused").set(report.refused)
            kept_back.labels("held").set(report.held)
            waiting.set(report.waiting_for)
            given_up.set(report.given_up)
            corrected.labels("label").set(report.corrected)
            corrected.labels("kind").set(report.upgraded)
            for kind, (on_time, late_ones) in report.takes.items():
                takes.labels(kind, "in_time").set(on_time)
                takes.labels(kind, "late").set(late_ones)
            too_late.set(report.takes_too_late)
            for kind, count in report.kinds.items():
                kinds.labels(kind).set(count)
            for partition, count in report.late_by_partition.items():
                late.labels(str(partition)).set(count)
            forgotten_ids.set(report.ids_forgotten)
            transactions.set(report.open_transactions)
            if report.trees is not None:
                trees.set(report.trees.trees)
                trees_share.set(report.trees.share)
                tree_fits.labels("made").set(report.trees.fits)
                tree_fits.labels("one_label").set(report.trees.fits_missed)
            event_time.set(report.last_event_at or 0)
            for name, value in report.prequential.items():
                if value is not None:
                    metric.labels(name).set(value)

        compared = self._counter("mim_train_skew_rows_total", "Served rows whose features were compared", "outcome")
        share = self._gauge("mim_train_skew_share", "Share of the rows compared last of which a feature differs")
        for outcome in ("equal", "differing"):
            compared.labels(outcome)

        def on_skew(report: SkewReport) -> None:
            compared.labels("equal").inc(report.rows - report.differing)
            compared.labels("differing").inc(report.differing)
            share.set(report.differing / max(1, report.rows))

        self._handlers |= {TrainReport: handle, SkewReport: on_skew}


@asynccontextmanager
async def metrics_server(metrics: Metrics, host: str, port: int | None) -> AsyncIterator[None]:
    """Serve `/metrics` while the block runs; without a port (None or 0) do nothing.

    Raises `Misconfigured` if the port is taken.
    """
    if not port:
        yield
        return

    async def show(request: web.Request) -> web.Response:
        return web.Response(body=metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", show)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise Misconfigured(f"--metrics-port {port} on {host} cannot be used: {error.strerror}") from None
        yield
    finally:
        await runner.cleanup()
