"""The Faust application of the item path, made inside the running loop: importing this module creates nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust
import structlog
from aiokafka import errors as aio_errors
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer
from faust.types import TP, AppT, EventT, StreamT
from typing_extensions import override

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig, never_create_topics
from streams.broker.header_names import accept_any_names
from streams.broker.heartbeats import Heartbeats
from streams.broker.topics import TopicName, TopicsConfig
from streams.indexing.agents import ImageRetryPool, IsCurrent, ItemPipeline, Report
from streams.indexing.config import IndexConfig
from streams.indexing.context import IndexContext
from streams.indexing.flow import Flow
from streams.indexing.query_agent import QueryAnnouncer
from streams.indexing.take_over import MAX_REMEMBERED_RECORDS, RecentWrites
from streams.runtime.delivery import Patience

log = structlog.get_logger()

OUTAGE_SECONDS = 86_400.0
"""How long a sink may be away: partitions pause meanwhile, and a client that fetches nothing for so long loses them."""

STOP_PATIENCE_SECONDS = 10.0
"""How long Faust may take to commit and to close its connections."""

_BEHAVIOURS_BUFFER_BATCHES = 8

REVOKE_PATIENCE_SECONDS = 10.0
"""How long a rebalance waits for a write that is under way."""


def create_index_app(
    context: IndexContext,
    flow: Flow,
    *,
    broker: BrokerConfig,
    topics: TopicsConfig,
    instance_id: str,
    folder: Path,
    on_report: Report,
    on_ready: Callable[[], None],
) -> AppT:
    """Make the application and bind its agents to `items` and `items-retry`, and to `behaviours` if told to.

    What is set here keeps records from being lost: raw bytes (what Faust cannot decode it commits silently), no
    tables, no topic of Faust's own, a stable instance id. Faust's own assignor assigns topics of equal partition counts
    together, whichever others there are; the driver's default does not. Records of open and aborted transactions are
    not read.
    """
    config = context.config
    accept_any_names()
    never_create_topics()
    app = faust.App(
        topics.group("index"),
        broker=[f"kafka://{server}" for server in broker.bootstrap_servers.split(",")],
        broker_credentials=faust_credentials(broker),
        broker_client_id=broker.client_id,
        broker_commit_interval=config.commit_interval_seconds,
        broker_session_timeout=config.session_timeout_seconds,
        broker_heartbeat_interval=config.session_timeout_seconds / 10,
        broker_request_timeout=max(90.0, config.session_timeout_seconds + 10),
        broker_max_poll_records=config.batch_max_items,
        broker_max_poll_interval=OUTAGE_SECONDS,
        consumer_group_instance_id=instance_id,
        consumer_auto_offset_reset="earliest",
        consumer_metadata_max_age_ms=round(config.topic_check_seconds * 1000),
        consumer_max_fetch_size=broker.max_record_bytes + 65_536,
        key_serializer="raw",
        value_serializer="raw",
        stream_wait_empty=False,
        stream_buffer_maxsize=config.batch_max_items * 2,
        table_standby_replicas=1,  # no table, but above 0 it selects the assignor that keeps topics together
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        datadir=str(folder),
        autodiscover=False,
        worker_redirect_stdouts=False,
        loop=asyncio.get_running_loop(),
    )

    app.transport.Consumer = _CommittedConsumer
    heartbeats = Heartbeats(time.monotonic)
    flow.watch_session(lambda: heartbeats.assert_within(config.silence_seconds))
    recent = RecentWrites(
        window_seconds=config.recheck_seconds,
        max_records=MAX_REMEMBERED_RECORDS,
        max_taken_over=config.held_records,
        clock=time.monotonic,
    )
    assignment = _Assignment(app, topics, flow, context.writing, heartbeats, recent, on_ready)
    bind_agents(
        app,
        context,
        flow,
        recent,
        topics=topics,
        is_current=assignment.is_current,
        on_report=on_report,
        count_partitions=lambda: assignment.partitions["items"],
    )
    app.on_partitions_revoked.connect(assignment.on_revoked, weak=False)
    app.on_partitions_assigned.connect(assignment.on_assigned, weak=False)
    return app


class _CommittedThread(AIOKafkaConsumerThread):  # type: ignore[misc]
    @override
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"  # Faust sets it only if it writes in transactions itself
        return consumer


class _CommittedConsumer(Consumer):  # type: ignore[misc]
    """Faust's consumer, reading committed records only, and committing past offsets that have no record.

    Faust stops committing after offset 0 if the next record is not 1 or 2. All agents acknowledge in order, so the
    newest acknowledged record is the one to commit.
    """

    @override
    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _CommittedThread(self, loop=self.loop, beacon=self.beacon)

    @override
    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        pass

    @override
    def _new_offset(self, tp: TP) -> int | None:
        acked: list[int] = self._acked[tp]
        if not acked:
            return None
        newest = max(acked)
        acked.clear()
        self._acked_index[tp].clear()
        return newest + 1


@dataclass
class _Assignment:
    """Follows which partitions the group assigns to this worker."""

    app: AppT
    topics: TopicsConfig
    flow: Flow
    writing: asyncio.Lock
    heartbeats: Heartbeats
    recent: RecentWrites
    on_ready: Callable[[], None]
    _is_moving: bool = False
    """Partitions were revoked and not assigned again: until then Faust's generation is still that of the old ones."""
    partitions: dict[str, int] = field(default_factory=lambda: {"items": 0, "items-retry": 0})
    """How many partitions the topics had at the last assignment."""

    def is_current(self, event: EventT[Any]) -> bool:
        """Whether an event was read under the present assignment."""
        return not self._is_moving and bool(event.message.generation_id == self.app.consumer_generation_id)

    async def on_revoked(self, sender: AppT, revoked: Any, **_: Any) -> None:
        """Wait for a write under way to end before another worker may read its partition."""
        self._is_moving = True
        self.flow.partitions_moved()
        try:
            await asyncio.wait_for(self.writing.acquire(), REVOKE_PATIENCE_SECONDS)
        except TimeoutError:
            return
        self.writing.release()

    async def on_assigned(self, sender: AppT, assigned: Any, **_: Any) -> None:
        """Go on with these partitions; fail if those of `items` and `items-retry` differ."""
        self._is_moving = False
        consumer = self.app.consumer._thread._consumer
        self.heartbeats.watch(consumer._coordinator)
        self.recent.take_over()
        of_topic: dict[str, list[int]] = {}
        for name in ("items", "items-retry"):
            full = self.topics.full_name(name)
            of_topic[name] = sorted(tp.partition for tp in assigned if tp.topic == full)
            self.partitions[name] = len(consumer._client.cluster.partitions_for_topic(full) or ())
        log.info("index.assigned", items=of_topic["items"], items_retry=of_topic["items-retry"], of=self.partitions)
        if (error := assignment_error(self.topics, of_topic, self.partitions)) is None:
            self.on_ready()
        else:
            self.flow.fail(error)


class WrongAssignment(Misconfigured):
    """Partitions that do not go together. The group remembers them for its member, so that has to leave."""


def assignment_error(
    topics: TopicsConfig, assigned: Mapping[str, Sequence[int]], partitions: Mapping[str, int]
) -> WrongAssignment | None:
    """Why a worker cannot go on with the partitions that it was assigned; None if it can."""
    items, retries = topics.full_name("items"), topics.full_name("items-retry")
    if partitions["items"] != partitions["items-retry"]:
        return different_partitions(items, partitions["items"], retries, partitions["items-retry"])
    if assigned["items"] != assigned["items-retry"]:
        return WrongAssignment(
            f"group {topics.group('index')!r} gives this worker partitions {assigned['items']} of {items} but "
            f"{assigned['items-retry']} of {retries}; they must go together. Start the worker again: it has left "
            "the group, which assigns anew. If that does not help, some of its workers run another version"
        )
    return None


def different_partitions(items: str, its: int, retries: str, theirs: int) -> WrongAssignment:
    """The refusal of topics with different numbers of partitions."""
    wide, most = (items, its) if its > theirs else (retries, theirs)
    narrow = retries if wide == items else items
    return WrongAssignment(
        f"{items} has {its} partitions and {retries} has {theirs}: they must have the same number, so that one worker "
        f"reads an item and its retries. Give {narrow} as many as {wide} (kafka-topics --alter --topic {narrow} "
        f"--partitions {most}), set MIM_TOPICS__PARTITIONS={most}, and start all workers again"
    )


def read_topics(config: IndexConfig, topics: TopicsConfig) -> frozenset[str]:
    """Full names of the topics that a worker reads."""
    names: tuple[TopicName, ...] = ("items", "items-retry", *(("behaviours",) if config.queries else ()))
    return frozenset(map(topics.full_name, names))


def bind_agents(
    app: AppT,
    context: IndexContext,
    flow: Flow,
    recent: RecentWrites,
    *,
    topics: TopicsConfig,
    is_current: IsCurrent,
    on_report: Report,
    count_partitions: Callable[[], int] = lambda: 0,
) -> dict[TopicName, Any]:
    """Bind the agents to their topics; returns them by topic.

    All topics are read by one consumer, which waits for a buffer that is full. So that of `behaviours` has room for
    what is still fetched before Faust pauses their partitions, and items need not wait for searches.
    """
    config = context.config

    async def index_items(stream: StreamT[bytes]) -> None:
        await ItemPipeline(context, flow, recent, is_current, on_report, stream, count_partitions).run()

    async def retry_images(stream: StreamT[bytes]) -> None:
        await ImageRetryPool(context, flow, is_current, on_report, asyncio.sleep, stream).run()

    async def announce_queries(stream: StreamT[bytes]) -> None:
        await QueryAnnouncer(context, flow, is_current, on_report, stream).run()

    items = app.topic(topics.full_name("items"), key_serializer="raw", value_serializer="raw")
    retries = app.topic(topics.full_name("items-retry"), key_serializer="raw", value_serializer="raw")
    bound: dict[TopicName, Any] = {
        "items": app.agent(items, name="index-items")(index_items),
        "items-retry": app.agent(retries, name="retry-images")(retry_images),
    }
    if config.queries:
        behaviours = app.topic(
            topics.full_name("behaviours"),
            key_serializer="raw",
            value_serializer="raw",
            maxsize=config.batch_max_items * _BEHAVIOURS_BUFFER_BATCHES,
        )
        bound["behaviours"] = app.agent(behaviours, name="announce-queries")(announce_queries)
    return bound


async def run_app(
    make_app: Callable[[], AppT],
    flow: Flow,
    stop: asyncio.Event,
    *,
    drain_seconds: float,
    patience: Patience,
) -> None:
    """Run the application until `stop` is set, then finish what is in hand and commit.

    Faust gives up when a commit meets a broker that is away; a new application then takes over under the same instance
    id, from the last commit. Raises what the agents could not go on from (`Flow.failed`).
    """
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    attempt = 0
    try:
        while not stop.is_set():
            app = make_app()
            started = asyncio.get_running_loop().time()
            running: asyncio.Future[Any] = asyncio.ensure_future(_run_until_crash(app))
            try:
                ended: set[asyncio.Future[Any]] = {running, stopping, flow.failed}
                await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set() and not await flow.drain(drain_seconds):
                    log.warning("index.not_drained", within_seconds=drain_seconds)
            finally:
                await _stop(app, running)
            if flow.failed.done():
                flow.failed.result()
            if stop.is_set():
                return
            flow.partitions_moved()
            attempt = 1 if asyncio.get_running_loop().time() - started > 30 else attempt + 1
            wait = patience.config.wait_seconds(attempt, patience.draw())
            log.warning("index.reconnecting", reason=repr(app.crash_reason), wait_seconds=round(wait, 3))
            await asyncio.wait({stopping}, timeout=wait)
    finally:
        stopping.cancel()


async def _run_until_crash(app: AppT) -> None:
    """Return when Faust has given up, for whatever reason."""
    try:
        await app.start()
        await app.wait_until_stopped()
    except (aio_errors.KafkaError, OSError, faust.exceptions.FaustError) as error:
        await app.crash(error)


async def _stop(app: AppT, running: asyncio.Future[None]) -> None:
    running.cancel()
    await asyncio.wait({running})
    stopping = asyncio.ensure_future(app.stop())
    _, late = await asyncio.wait({stopping}, timeout=STOP_PATIENCE_SECONDS)
    if late:
        stopping.cancel()
        await asyncio.wait({stopping}, timeout=1.0)
    elif stopping.exception() is not None:
        log.warning("index.app_stop_failed", error=repr(stopping.exception()))


def faust_credentials(broker: BrokerConfig) -> faust.types.auth.CredentialsT | None:
    """How Faust logs in; None without SASL and TLS."""
    options = broker.client_options()
    context = options.get("ssl_context")
    if "SASL" in broker.security_protocol:
        return faust.SASLCredentials(
            mechanism=options["sasl_mechanism"],
            username=options["sasl_plain_username"],
            password=options["sasl_plain_password"],
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context is not None else None
