"""Wiring of `mimstream train`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog

from schemas.errors import Misconfigured
from schemas.manifests import TopicOffsets
from streams.broker.cluster import (
    TRAINING_TOPICS,
    ClusterTopics,
    describe_topics,
    read_incarnation,
    training_topics,
)
from streams.broker.forgotten import ForgottenFollower
from streams.broker.leadership import Leadership
from streams.broker.topic_follower import TopicFollower
from streams.monitoring.metrics import Metrics, metrics_server
from streams.runtime.extras import require_package
from streams.runtime.interval import IntervalTimer
from streams.runtime.process import run_until_stopped
from streams.settings import Settings
from streams.stores.artifacts.artifact_store import FolderArtifactStore
from streams.stores.artifacts.checkpoints import CheckpointStore
from streams.stores.artifacts.journal import JournalStore
from streams.stores.artifacts.registry import ModelRegistry, open_registry, pack_weights, weights_checksum
from streams.training.checkpointing import Checkpointer, learning_config
from streams.training.claim import claim_term
from streams.training.event_times import EventTimeFinder
from streams.training.input import TrainingInput
from streams.training.loop import TrainingLoop
from streams.training.offset_commits import OffsetCommits
from streams.training.promotion_gate import PromotionGate
from streams.training.release_publisher import ReleasePublisher
from streams.training.release_schedule import ReleaseScheduler
from streams.training.reports import TrainReports
from streams.training.scores import SCORES_FOLDER, ScoreFiles, write_row_lines
from streams.training.skew_watch import SkewWatch
from streams.training.state_publisher import StatePublisher, read_states
from streams.training.trainer_thread import TrainerThread
from streams.wiring.offsets_file import read_offsets
from streams.wiring.rights import RIGHTS
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.forgotten import ForgottenUsers

if TYPE_CHECKING:
    from trainer.metrics import ScoredRows
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()

MakeTrainer: TypeAlias = "Callable[[str, int, Sequence[int]], OnlineTrainer]"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What one run does, beside the settings."""

    until_end: bool
    """Train to the ends of the topics as they are now, and report."""
    release: bool
    """Stand for election, and release as the leader; else train beside it."""
    write_state: bool
    """Write `accounts.json` and scores to the state folder."""
    from_snapshot: str | None = None
    """Go on from this checkpoint instead of the newest."""
    from_offsets: Path | None = None
    """Begin anew at the offsets in this file."""
    from_time: datetime | None = None
    """Begin anew where the log reaches this event time."""
    until: datetime | None = None
    """End where the log reaches this event time."""
    scores: Path | None = None
    """Keep all prequential scores in this folder."""
    rows: Path | None = None
    """List the training rows in this file."""
    replace: bool = False
    """Release also what goes no further in the log than what was released from it before."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port."""


async def train(settings: Settings, options: TrainOptions) -> dict[str, Any] | None:
    """Train to the end or until stopped; the report of a run that came to its end."""
    # torch takes seconds to import: here, not while a loop that owes heartbeats waits for it
    make_trainer = trainer_maker(settings)
    if settings.models.url is not None and settings.models.url.startswith("s3://"):
        require_package("s3fs", "MIM_MODELS__URL with s3://")
    metrics = Metrics("train")
    report: dict[str, Any] | None = None

    async def work(stop: asyncio.Event) -> None:
        nonlocal report
        if not options.release:
            report = await _train(settings, options, make_trainer, metrics, stop, None)
            return
        # a wrong address or a topic that is not there is an error at once
        await asyncio.to_thread(
            describe_topics,
            settings.kafka,
            settings.topics,
            RIGHTS["train"].needed(queries=settings.trainer.features.queries),
        )
        group = settings.topics.group("train")
        leadership = Leadership(
            settings.kafka,
            group=group,
            topic=settings.topics.full_name("models"),
            transactional_id=group,
            session_timeout_ms=settings.train.session_timeout_ms,
        )
        async with leadership.candidate():
            log.info("train.standby", group=group)
            if await leadership.elected(stop):
                log.info("train.elected")
                report = await _train(settings, options, make_trainer, metrics, stop, leadership)

    async with metrics_server(metrics, settings.metrics.host, options.metrics_port):
        await run_until_stopped(work)
    return report


async def _train(
    settings: Settings,
    options: TrainOptions,
    make_trainer: MakeTrainer,
    metrics: Metrics,
    stop: asyncio.Event,
    leadership: Leadership | None,
) -> dict[str, Any] | None:
    config = settings.train
    log_now = await asyncio.to_thread(describe_log, settings)
    registry = None
    if leadership is not None:
        registry = open_registry(settings.models)
        await asyncio.to_thread(registry.check)
        fence = await claim_term(leadership, make_checkpoint_store(settings), registry)
        log.info("train.claimed", **fence.model_dump())
    checkpointer = _make_checkpointer(settings, leadership)
    start_at, end_at = await _span(settings, options, log_now)
    found = None
    if leadership is not None or options.from_snapshot:
        found = await asyncio.to_thread(checkpointer.load, options.from_snapshot, anew=start_at is not None)
    # deletes may have been compacted away since: what is left of vectors is read from its beginning
    outdated = found is not None and _tombstones_gone(settings, found.meta.created_at)
    if found is not None:
        start_at = {name: parts for name, parts in found.meta.offsets.items() if not outdated or name == "behaviours"}
    reads = TrainingInput(
        settings.kafka,
        settings.topics,
        field_map=settings.record.field_map,
        encoder_version=config.encoder_version if found is None else found.meta.encoder_version,
        start_at=start_at,
        end_at=end_at,
        fetch_max_records=config.fetch_max_records,
        buffered_records=config.buffered_records,
        idle_seconds=config.idle_seconds,
        all_idle_seconds=config.all_idle_seconds,
        open_transaction_seconds=config.open_transaction_seconds,
        bounded=options.until_end,
        queries=settings.trainer.features.queries,
        clock=time.time,
    )
    scores = _score_files(settings, options)
    thread = TrainerThread(
        reads,
        make_trainer,
        waits=EmbeddingWait(timeout_seconds=config.hold_seconds),
        forgotten=ForgottenUsers(log_now.cluster_id, log_now.topic_ids["behaviours"]),
        scores=scores,
        reread_embeddings=outdated,
    )
    scored: list[ScoredRows] = []
    reports = TrainReports(
        interval=IntervalTimer(config.report_interval_seconds, time.time),
        folder=config.state_folder if options.write_state else None,
        scores=scores,
        on_scored=scored.extend if options.until_end else lambda rows: None,
        on_report=metrics.record,
    )
    loop = TrainingLoop(
        reads,
        thread,
        reports,
        checkpointer=None if leadership is None else checkpointer,
        releases=(
            None
            if leadership is None or registry is None
            else _make_releases(settings, options, registry, thread, checkpointer, leadership)
        ),
        commits=None if leadership is None else _make_commits(settings, thread, leadership),
        states=None if leadership is None else _make_states(settings, thread, leadership, log_now, metrics),
        follower=ForgottenFollower(settings.kafka, settings.topics, thread.to_forget),
        clock=time.time,
    )
    await loop.run(stop, found)
    if not options.until_end or stop.is_set():
        return None
    return await asyncio.to_thread(_describe, loop, scored, options.rows)


def _make_checkpointer(settings: Settings, leadership: Leadership | None) -> Checkpointer:
    config = learning_config(
        settings.trainer.model_dump(mode="json"), settings.train.variants, settings.record.field_map
    )
    return Checkpointer(
        make_checkpoint_store(settings),
        make_journal_store(settings),
        read_log=lambda: _describe_reads(settings),
        config=config,
        encoder_version=settings.train.encoder_version,
        fence=None if leadership is None else leadership.fence,
        every_events=settings.train.snapshot_every_events,
        clock=time.time,
    )


def _make_releases(
    settings: Settings,
    options: TrainOptions,
    registry: ModelRegistry,
    thread: TrainerThread,
    checkpointer: Checkpointer,
    leadership: Leadership,
) -> ReleaseScheduler:
    publisher = ReleasePublisher(
        registry,
        leadership,
        notices_topic=settings.topics.full_name("models"),
        read_log=lambda: describe_log(settings),
        clock=time.time,
        replace=options.replace,
    )
    every = settings.train.release_every_seconds
    return ReleaseScheduler(
        thread,
        publisher,
        PromotionGate(registry, publisher, settings.gate),
        leadership,
        checkpointer=checkpointer,
        every=None if every is None else IntervalTimer(every, time.time),
        until_end=options.until_end,
    )


def _make_commits(settings: Settings, thread: TrainerThread, leadership: Leadership) -> OffsetCommits:
    return OffsetCommits(
        leadership,
        thread.committed_offsets,
        topic=settings.topics.full_name("behaviours"),
        interval_seconds=settings.train.commit_interval_seconds,
        clock=time.time,
    )


def _make_states(
    settings: Settings, thread: TrainerThread, leadership: Leadership, log_now: ClusterTopics, metrics: Metrics
) -> StatePublisher:
    from trainer.features.state_records import StateWriter  # numpy

    return StatePublisher(
        leadership,
        thread,
        StateWriter(settings.trainer.features, log=log_now.topic_ids["behaviours"]),
        settings.train,
        skew=SkewWatch(
            settings.trainer.features,
            every_seconds=settings.train.skew_every_seconds,
            limit=settings.train.skew_limit,
            topic=settings.topics.full_name("skew"),
            clock=time.time,
            on_report=metrics.record,
            follow=partial(TopicFollower, settings.kafka, settings.topics, "skew"),
        ),
        read=partial(read_states, settings.kafka, settings.topics),
        read_id=lambda: read_incarnation(settings.kafka, settings.topics, "item-states").topic_id,
        topic=settings.topics.full_name("item-states"),
        clock=time.time,
    )


async def _span(
    settings: Settings, options: TrainOptions, log_now: ClusterTopics
) -> tuple[TopicOffsets | None, dict[int, int] | None]:
    """Where reading begins, if not where a checkpoint or the log does, and where it ends before the log does."""
    start_at = None if options.from_offsets is None else read_offsets(options.from_offsets)
    wished: dict[str, datetime | None] = {"--from": options.from_time, "--until": options.until}
    moments = {name: at for name, at in wished.items() if at is not None}
    if not moments:
        return start_at, None
    finder = EventTimeFinder(
        settings.kafka,
        settings.topics,
        field_map=settings.record.field_map,
        log_now=log_now,
        file=training_folder(settings) / "event-times.json",
    )
    found = dict(zip(moments, await finder.reached(*moments.values()), strict=True))
    log.info("train.span", **{name.strip("-"): offsets for name, offsets in found.items()})
    return {"behaviours": found["--from"]} if "--from" in found else start_at, found.get("--until")


def _tombstones_gone(settings: Settings, since: datetime) -> bool:
    return time.time() - since.timestamp() >= settings.topics.tombstone_retention_hours * 3600


def _score_files(settings: Settings, options: TrainOptions) -> ScoreFiles | None:
    if options.scores is not None:
        return ScoreFiles(options.scores)
    if not options.write_state:
        return None
    return ScoreFiles(settings.train.state_folder / SCORES_FOLDER, keep_files=settings.train.score_files)


def _describe(loop: TrainingLoop, scored: Sequence[ScoredRows], rows: Path | None) -> dict[str, Any]:
    from trainer.metrics import ScoredRows, prequential_report

    report = asdict(loop.report())
    for ours in ("updated_at", "prequential"):
        del report[ours]
    trainer = loop.trainer
    if rows is not None:
        write_row_lines(rows, scored)
    return {
        **report,
        "weights_sha256": None if trainer is None else weights_checksum(pack_weights(trainer.candidate().weights)),
        "prequential": prequential_report(ScoredRows.concatenate(list(scored))) if scored else {},
    }


def describe_log(settings: Settings) -> ClusterTopics:
    """The topics that a release is made of, as they are now. Blocking; raises as `describe_topics` does."""
    return describe_topics(settings.kafka, settings.topics, TRAINING_TOPICS)


def _describe_reads(settings: Settings) -> ClusterTopics:
    """The same for a checkpoint, which continues all that its trainer reads."""
    names = training_topics(queries=settings.trainer.features.queries)
    return describe_topics(settings.kafka, settings.topics, names)


def make_checkpoint_store(settings: Settings) -> CheckpointStore:
    """The checkpoints that a trainer of these settings writes and goes on from."""
    folder = training_folder(settings)
    named = f"{folder} (MIM_TRAIN__SNAPSHOT_FOLDER)"
    artifacts, pieces = (
        FolderArtifactStore(folder, entries=entries, pointer=pointer, named=named)
        for entries, pointer in (("snapshots", "current.json"), ("pieces", "pieces.json"))
    )
    return CheckpointStore(artifacts, pieces, keep=settings.train.keep_snapshots, named=named)


def make_journal_store(settings: Settings) -> JournalStore:
    """The journal of a trainer of these settings."""
    folder = training_folder(settings)
    named = f"{folder} (MIM_TRAIN__SNAPSHOT_FOLDER)"
    segments, vectors = (
        FolderArtifactStore(folder, entries=entries, pointer=f"{entries}.json", named=named)
        for entries in ("journal", "vectors")
    )
    return JournalStore(segments, vectors, named=named)


def training_folder(settings: Settings) -> Path:
    """Where snapshots, journal and archived vectors are kept."""
    return settings.train.snapshot_folder or settings.models.folder / "training"


def trainer_maker(settings: Settings) -> MakeTrainer:
    """Makes the trainer of these settings. Imports torch."""
    from trainer.online.trainer import OnlineTrainer

    variants = [name.strip() for name in settings.train.variants.split(",") if name.strip()]

    def make(encoder_version: str, dim: int, partitions: Sequence[int]) -> OnlineTrainer:
        try:
            return OnlineTrainer(
                settings.trainer,
                encoder_version=encoder_version,
                dim=dim,
                partitions=partitions,
                variants=variants,
            )
        except ValueError as error:
            raise Misconfigured(f"MIM_TRAIN__VARIANTS (--variants): {error}") from None

    return make
