"""Runs the demo: a stack of its own, the four processes, a replay, a steady load, and then counting."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog
from rich.console import Console

from schemas.errors import Unavailable
from streams.broker.clients import broker_errors, make_producer
from streams.broker.lag import GroupPositions
from streams.broker.topics import create_topics
from streams.demo.api import ServeApi
from streams.demo.audit import DrawnExposures, announced_items, compare_with_fresh, read_letters, searchable
from streams.demo.display import DemoProgress, show
from streams.demo.freshness import FreshnessProbe, FreshnessReport, probe_at_rate
from streams.demo.load import LoadReport, SteadyLoad
from streams.demo.options import DemoOptions
from streams.demo.outcome import VARIANTS, DemoResult, Neighbours
from streams.demo.sample_items import live_items, with_picture
from streams.replay.sender import Replay, Sent
from streams.replay.timeline import Outgoing, Timeline
from streams.runtime.child import Child, watch
from streams.settings import Settings, child_arguments, child_environment, child_settings
from streams.stack.run import RunningStack, folders_of, running_stack
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.training.reports import ACCOUNTS_FILE
from streams.training.scores import SCORES_FOLDER, read_scores
from streams.training.skew_report import read_skew, summary
from trainer.datasets.exposures import Behaviours
from trainer.datasets.kinds import kinds_told_apart

log = structlog.get_logger()

T = TypeVar("T")

ROLES = ("index", "record", "train", "serve")

ITEMS_IN_FLIGHT = 128
INDEX_COMMIT_SECONDS = 0.3
"""Two batches of the index worker and quick commits: enough to keep it busy, little enough that no item waits long."""
FRESHNESS_PROBES_AT_ONCE = 2
FRESHNESS_EVERY_SECONDS = 0.05
FRESHNESS_SPACING_SECONDS = 0.5
LIVE_ITEMS = 20
LIVE_PER_SECOND = 2.0
QUIET_SECONDS = 8.0
"""The trainer is done when it has received everything and its counts have not changed for this long."""
SKEW_EVERY_SECONDS = 3.0
STUCK_SECONDS = 180.0
"""How long draining may go on without any progress."""
SHOWN_ITEMS = 8


def run_demo(options: DemoOptions, settings: Settings, folder: Path, console: Console) -> DemoResult:
    """Run the whole loop in `folder`. Blocking; call it from the main thread.

    Raises `Unavailable` with the end of its log if a part or a process does not start or dies.
    """
    started = time.monotonic()
    console.print("starting Kafka, Valkey and Milvus Lite")
    with running_stack(folder / "stack", settings.stack, console=console) as stack:
        values = _values(stack, folder, _free_port(), _release_every(options.behaviours))
        if options.has_searches and "queries" not in settings.trainer.features.model_fields_set:
            values["trainer"]["features"] = {"queries": True}
        kinds = kinds_told_apart(options.data)
        if kinds and "kinds" not in settings.trainer.model.model_fields_set:
            values["trainer"]["model"] = settings.trainer.model.model_dump(exclude_unset=True) | {"kinds": kinds}
        own = child_settings(settings, values)
        create_topics(own.kafka, own.topics)
        console.print("starting index, record, train and serve")
        result = asyncio.run(_Run(options, own, values, folder, console).run())
    return replace(result, wall_seconds=time.monotonic() - started)


def _values(stack: RunningStack, folder: Path, port: int, release_every_rows: int) -> dict[str, dict[str, Any]]:
    """Settings of this run alone, handed to the children as their environment."""
    folders = folders_of(folder)
    return {
        **stack.endpoints,
        "models": folders["models"] | {"keep_releases": 50},
        # nothing is under way once the replay has ended
        "train": folders["train"]
        | {"variants": ",".join(VARIANTS), "all_idle_seconds": 5.0, "skew_every_seconds": SKEW_EVERY_SECONDS},
        "trainer": {"release_every_rows": release_every_rows},
        "gate": {"trial_rows": release_every_rows // 2},
        "serve": {"host": "127.0.0.1", "port": port, "tokens": [], "skew_share": 1.0},
        "replay": {"max_items_in_flight": ITEMS_IN_FLIGHT},
        "index": {"commit_interval_seconds": INDEX_COMMIT_SECONDS},
    }


def _release_every(behaviours: Behaviours) -> int:
    """Rows between releases: about eight releases in a run, none so small that it learned nothing."""
    return max(2_000, int((~behaviours.is_take).sum()) // 8)


class _Run:
    """One run, inside its event loop."""

    def __init__(
        self,
        options: DemoOptions,
        settings: Settings,
        values: dict[str, dict[str, Any]],
        folder: Path,
        console: Console,
    ) -> None:
        self._options = options
        self._settings = settings
        self._values = values
        self._folder = folder
        self._console = console
        self._progress = DemoProgress()
        self._children: dict[str, Child] = {}
        self._published: list[str] = []
        self._started_at = datetime.now(UTC)
        self._indexing: tuple[float, float] | None = None
        self._draws = DrawnExposures()

    async def run(self) -> DemoResult:
        timeline = Timeline(
            self._options.data,
            self._options.behaviours,
            self._options.seed,
            datetime.now(UTC),
            self._options.broken_share,
        )
        self._progress.items_total, self._progress.behaviours_total = timeline.items, timeline.events
        async with AsyncExitStack() as stack:
            display = asyncio.create_task(show(self._progress, self._console))
            stack.callback(display.cancel)
            stack.callback(self._stop_children)
            for role in ROLES[:-1]:
                self._start(role)
            for child in self._children.values():
                await child.ready()
            self._start(ROLES[-1])  # reads the encoder version from the center, which exists by now
            await self._children[ROLES[-1]].ready()
            api = await stack.enter_async_context(ServeApi(f"http://127.0.0.1:{self._settings.serve.port}"))
            return await self._unless_a_child_dies(self._stream(timeline, api))

    def _start(self, role: str) -> None:
        # threads of two processes that spin for the same core halve each other: only the encoder gets more than one
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1) if role == "index" else 1)}
        self._children[role] = Child(
            [*child_arguments(self._options.config_file), role],
            self._folder / f"{role}.log",
            child_environment(self._settings, self._values) | threads,
        )

    def _stop_children(self) -> None:
        for role in reversed(ROLES):
            if role in self._children:
                self._children[role].stop()

    async def _unless_a_child_dies(self, work: Awaitable[T]) -> T:
        working = asyncio.ensure_future(work)
        watching = asyncio.create_task(watch(list(self._children.values())))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                watching.result()  # raises
            return working.result()
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _stream(self, timeline: Timeline, api: ServeApi) -> DemoResult:
        settings = self._settings
        probe = FreshnessProbe(
            api,
            at_once=FRESHNESS_PROBES_AT_ONCE,
            every_seconds=FRESHNESS_EVERY_SECONDS,
            spacing_seconds=FRESHNESS_SPACING_SECONDS,
        )
        sent_everything, quiet = asyncio.Event(), asyncio.Event()
        followed = GroupPositions(
            settings.kafka, settings.topics, {"items": ["index"], "behaviours": ["record", "train"]}
        )
        async with AsyncExitStack() as stack:
            positions = await stack.enter_async_context(followed)
            producer = make_producer(settings.kafka)
            with broker_errors(settings.kafka):
                await producer.start()
            stack.push_async_callback(producer.stop)

            def acknowledged(outgoing: Outgoing, at: float) -> None:
                if outgoing.topic == "behaviours" and outgoing.reason is None:
                    self._draws.see(outgoing.value)
                if outgoing.topic == "items" and outgoing.reason is None:
                    item_id = outgoing.key.decode()
                    self._published.append(item_id)
                    probe.published(item_id, at)

            replay = Replay(
                producer,
                settings.kafka,
                settings.topics,
                settings.replay,
                positions=positions,
                on_acknowledged=acknowledged,
            )
            load = SteadyLoad(
                api,
                users=self._options.data.user_ids,
                published=self._published,
                per_second=self._options.requests_per_second,
                candidates=20,
                seed=self._options.seed,
                searches=self._options.searches,
                reached=lambda: replay.sent.second,
            )
            self._progress.doing = "replaying"
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._follow(positions, replay.sent, load.report))
                probing = tasks.create_task(probe.run(sent_everything))
                loading = tasks.create_task(load.run(quiet))
                await replay.run(timeline)
                sent_everything.set()
                self._progress.doing = "waiting until everything is indexed, recorded and trained"
                accounts = await self._drained(replay.sent)
                quiet.set()
                await probing
                await loading
                watching.cancel()
            self._progress.doing = "counting"
            topic = settings.topics.full_name("items")

            async def send(item_id: str, payload: bytes) -> None:
                with broker_errors(settings.kafka):
                    await producer.send_and_wait(topic, payload, key=item_id.encode())

            return await self._count(api, replay.sent, probe, load.report, accounts, send)

    async def _follow(self, positions: GroupPositions, sent: Sent, load: LoadReport) -> None:
        """Keep the display and the indexing time up to date, until cancelled."""
        started = time.monotonic()
        progress = self._progress
        while True:
            progress.items_sent, progress.behaviours_sent, progress.second = sent.items, sent.behaviours, sent.second
            progress.requests = load.requests
            with suppress(Unavailable):
                consumed = await positions.consumed()
                if consumed["items"]["index"] > progress.items_indexed:
                    self._indexing = (started, time.monotonic())
                progress.items_indexed = consumed["items"]["index"]
                progress.behaviours_recorded = consumed["behaviours"]["record"]
            report = self._trainer_report()
            progress.behaviours_trained = report["accounts"]["trained"]
            progress.releases = report["releases"]
            await asyncio.sleep(0.5)

    async def _drained(self, sent: Sent) -> dict[str, Any]:
        """Wait until every process has read everything; returns the trainer's report then."""
        progress = self._progress
        last: Any = None
        moved_at = time.monotonic()
        while True:
            report = self._trainer_report()
            seen = (report["accounts"], report["waiting_for"], progress.items_indexed, progress.behaviours_recorded)
            now = time.monotonic()
            if seen != last:
                last, moved_at = seen, now
            read = progress.items_indexed >= sent.items and progress.behaviours_recorded >= sent.behaviours
            trained = report["accounts"]["received"] >= sent.behaviours and not report["waiting_for"]
            if read and trained and now - moved_at > QUIET_SECONDS:
                return report
            if now - moved_at > STUCK_SECONDS:
                role = "train" if read else "index" if progress.items_indexed < sent.items else "record"
                raise Unavailable(
                    f"`mimstream {role}`",
                    f"nothing has moved for {STUCK_SECONDS:.0f} s; sent {sent.items} items and {sent.behaviours} "
                    f"behaviours, indexed {progress.items_indexed}, recorded {progress.behaviours_recorded}, trainer "
                    f"{report['accounts']}\n{self._children[role].tail()}",
                )
            await asyncio.sleep(0.5)

    def _trainer_report(self) -> dict[str, Any]:
        """The trainer's newest report."""
        path = self._folder / "train" / ACCOUNTS_FILE
        if not path.exists():
            zero = dict.fromkeys(("received", "trained", "late", "duplicate", "dead_lettered", "pending"), 0)
            return {"accounts": zero, "waiting_for": 0, "releases": 0, "rows_sha256": ""}
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    async def _count(
        self,
        api: ServeApi,
        sent: Sent,
        probe: FreshnessProbe,
        load: LoadReport,
        report: dict[str, Any],
        send: Callable[[str, bytes], Awaitable[object]],
    ) -> DemoResult:
        from encoders.loading import load_encoder  # torch is not needed before

        settings, data = self._settings, self._options.data
        encoded = await announced_items(settings.kafka, settings.topics)
        letters = await read_letters(settings.kafka, settings.topics, sent.broken, encoded)
        found = await searchable(api, sorted(encoded))
        store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
        try:
            stored = (await store.counts())["stored"]
        finally:
            await store.close()
        sampled = encoded - sent.without_picture
        held = [position for position, item_id in enumerate(data.item_ids) if item_id in sampled]
        sample = sorted(random.Random(self._options.seed).sample(held, min(self._options.sample_items, len(held))))
        encoder = await asyncio.to_thread(load_encoder, settings.encoder)
        cosine = await compare_with_fresh(api, encoder, data, sample, outcomes=settings.index.outcomes)
        first, last = self._indexing or (0.0, 0.0)
        return DemoResult(
            data=data.name,
            pictures=self._options.pictures,
            exposures=self._options.behaviours.drawn_from or "as the set observed them",
            left_out=data.left_out,
            seed=self._options.seed,
            takes=int(self._options.behaviours.is_take.sum()),
            items_published=sent.items,
            items_encoded=len(encoded),
            items_searchable=len(found),
            behaviours_sent=sent.behaviours,
            behaviours_stored=stored,
            accounts=report["accounts"],
            letters=letters,
            freshness=probe.report,
            indexing_seconds=last - first,
            releases=report["releases"],
            load=load,
            sample_items=len(sample),
            sample_cosine=cosine,
            rows_sha256=report["rows_sha256"],
            encoder_version=encoder.version,
            consistency_level=settings.milvus.consistency_level,
            wall_seconds=0.0,
            scored=read_scores(self._folder / "train" / SCORES_FOLDER),
            neighbours=await self._new_items(api, encoded),
            live=await self._probe_live(api, send),  # last: these items are in no other figure
            live_per_second=LIVE_PER_SECOND,
            draws_without_source=0 if data.negatives is not None else self._draws.without_source,
            skew=summary(
                await read_skew(settings.kafka, settings.topics, self._started_at), limit=settings.train.skew_limit
            ),
        )

    async def _probe_live(self, api: ServeApi, send: Callable[[str, bytes], Awaitable[object]]) -> FreshnessReport:
        """Publish new items one by one, as a shop does."""
        self._progress.doing = "publishing single items"
        items = await asyncio.to_thread(live_items, self._options.data, LIVE_ITEMS)
        return await probe_at_rate(api, send, items, per_second=LIVE_PER_SECOND, every_seconds=FRESHNESS_EVERY_SECONDS)

    async def _new_items(self, api: ServeApi, encoded: set[str]) -> list[Neighbours]:
        """Some items that were published late in the stream, with their nearest neighbours."""
        data = self._options.data
        late = [item for item in data.item_ids[len(data.item_ids) * 3 // 4 :] if item in encoded]
        records = await asyncio.to_thread(with_picture, data, late, SHOWN_ITEMS, self._options.seed)
        if not records:
            return []
        results = await api.similar([record.item_id for record in records], k=5, include_self=False)
        return [
            Neighbours(record.item_id, [(one.item_id, one.similarity) for one in result.neighbours])
            for record, result in zip(records, results, strict=True)
        ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
