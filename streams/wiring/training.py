"""Wiring of `mimstream train`."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured
from schemas.manifests import TopicOffsets
from streams.broker.cluster import TRAINING_TOPICS, ClusterTopics, describe_topics
from streams.broker.forgotten import ForgottenFollower
from streams.broker.leadership import Leadership
from streams.monitoring.metrics import Metrics, metrics_server
from streams.runtime.process import run_until_stopped
from streams.settings import Settings
from streams.stores.artifacts.artifact_store import FolderArtifactStore
from streams.stores.artifacts.checkpoints import CheckpointStore
from streams.stores.artifacts.journal import JournalStore
from streams.stores.artifacts.registry import open_registry, pack_weights, weights_checksum
from streams.training.checkpointing import Checkpoints, learning_config
from streams.training.event_times import EventTimeFinder
from streams.training.input import TrainingInput
from streams.training.loop import TrainOnBehaviours
from streams.training.releaser import ReleasePublisher
from streams.training.scores import SCORES_FOLDER, ScoreFiles, write_row_lines
from trainer.samples.forgotten import ForgottenUsers

if TYPE_CHECKING:
    from trainer.metrics import ScoredRows
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()


class _Train:
    """The wiring of one `mimstream train`."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        # torch takes seconds to import: here, not while a loop that owes heartbeats waits for it
        self._make_trainer = _trainer_maker(settings)
        self._options = options
        self._settings = settings
        self._metrics = Metrics()
        self._scored: list[ScoredRows] = []
        self._report: dict[str, Any] | None = None
        # a run that releases nothing leaves the state of the one that does alone, unless it is told where to write
        self._has_state = options.state is not None or not options.no_release

    async def run(self) -> dict[str, Any] | None:
        """Run to the end or until stopped; the report of a bounded run."""
        async with metrics_server(self._metrics, self._settings.metrics.host, self._options.metrics_port):
            await run_until_stopped(self._alone if self._options.no_release else self._as_candidate)
        return self._report

    async def _alone(self, stop: asyncio.Event) -> None:
        await self._train(stop, None)

    async def _as_candidate(self, stop: asyncio.Event) -> None:
        topics, train = self._settings.topics, self._settings.train
        await asyncio.to_thread(
            describe_topics, self._settings.kafka, topics, TRAINING_TOPICS
        )  # a wrong address is told at once
        leadership = Leadership(
            self._settings.kafka,
            group=topics.group("train"),
            topic=topics.full_name("models"),
            transactional_id=topics.group("train"),
            session_timeout_ms=train.session_timeout_ms,
        )
        async with leadership.candidate():
            log.info("train.standby", group=topics.group("train"))
            if await leadership.elected(stop):
                log.info("train.elected", fence=leadership.fence and leadership.fence.as_pair())
                await self._train(stop, leadership)

    async def _train(self, stop: asyncio.Event, leadership: Leadership | None) -> None:
        settings, options = self._settings, self._options
        config = settings.train
        log_now = await asyncio.to_thread(describe_topics, settings.kafka, settings.topics, TRAINING_TOPICS)
        snapshots = self._snapshots(leadership)
        resume = None
        start_at, end_at = await self._span(log_now)
        if leadership is not None or options.from_snapshot:
            resume = await asyncio.to_thread(snapshots.resume, options.from_snapshot, anew=start_at is not None)
        # deletes may have been compacted away since: what is left of `embeddings` is read from its beginning
        outdated = resume is not None and self._outdated(resume.meta.created_at)
        reads = TrainingInput(
            settings.kafka,
            settings.topics,
            field_map=settings.record.field_map,
            encoder_version=config.encoder_version if resume is None else resume.meta.encoder_version,
            start_at=start_at if resume is None else _without(resume.meta.offsets, "embeddings" if outdated else None),
            end_at=end_at,
            fetch_max_records=config.fetch_max_records,
            buffered_records=config.buffered_records,
            idle_seconds=config.idle_seconds,
            bounded=options.until_end,
            clock=time.time,
        )
        scores = self._score_files()
        consumer = TrainOnBehaviours(
            config,
            reads,
            behaviours_topic=settings.topics.full_name("behaviours"),
            make_trainer=self._make_trainer,
            leadership=leadership,
            make_releaser=None if leadership is None else self._releaser_maker(leadership),
            snapshots=None if leadership is None else snapshots,
            resume=resume,
            vectors_anew=outdated,
            gone=ForgottenUsers(log_now.cluster_id, log_now.topic_ids["behaviours"]),
            follow_forgotten=lambda tell: ForgottenFollower(settings.kafka, settings.topics, tell),
            gate=settings.gate,
            clock=time.time,
            bounded=options.until_end,
            state_folder=config.state_folder if self._has_state else None,
            scores=scores,
            on_scored=self._scored.extend if options.until_end else lambda scored: None,
            on_report=self._metrics.record,
        )
        await consumer.run(stop)
        if options.until_end and not stop.is_set():
            self._report = await asyncio.to_thread(self._describe, consumer)

    async def _span(self, log_now: ClusterTopics) -> tuple[TopicOffsets | None, dict[int, int] | None]:
        """Where reading begins, if not where a snapshot or the log does, and where it ends before the log does."""
        options, settings = self._options, self._settings
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

    def _outdated(self, taken_at: datetime) -> bool:
        return time.time() - taken_at.timestamp() >= self._settings.topics.tombstone_retention_hours * 3600

    def _snapshots(self, leadership: Leadership | None) -> Checkpoints:
        settings = self._settings
        trainer = settings.trainer.model_dump(mode="json")
        return Checkpoints(
            make_snapshot_store(settings),
            make_journal_store(settings),
            read_log=lambda: describe_topics(settings.kafka, settings.topics, TRAINING_TOPICS),
            config=learning_config(trainer, settings.train.variants, settings.record.field_map),
            encoder_version=settings.train.encoder_version,
            fence=None if leadership is None else leadership.fence,
            clock=time.time,
        )

    def _releaser_maker(self, leadership: Leadership) -> Any:
        def make(encoder_version: str, dim: int) -> ReleasePublisher:
            return ReleasePublisher(
                open_registry(self._settings.models),
                leadership,
                notices_topic=self._settings.topics.full_name("models"),
                read_log=lambda: describe_topics(self._settings.kafka, self._settings.topics, TRAINING_TOPICS),
                encoder_version=encoder_version,
                dim=dim,
                clock=time.time,
            )

        return make

    def _score_files(self) -> ScoreFiles | None:
        if self._options.scores is not None:
            return ScoreFiles(self._options.scores)
        if not self._has_state:
            return None
        folder = self._settings.train.state_folder / SCORES_FOLDER
        return ScoreFiles(folder, keep_files=self._settings.train.score_files)

    def _describe(self, consumer: TrainOnBehaviours) -> dict[str, Any]:
        from trainer.metrics import ScoredRows, prequential_report

        standing = asdict(consumer.standing())
        for ours in ("updated_at", "prequential"):
            del standing[ours]
        trainer = consumer.trainer
        weights = None if trainer is None else weights_checksum(pack_weights(trainer.candidate().weights))
        if self._options.rows is not None:
            write_row_lines(self._options.rows, self._scored)
        return {
            **standing,
            "weights_sha256": weights,
            "prequential": prequential_report(ScoredRows.concatenate(self._scored)) if self._scored else {},
        }


def _without(offsets: TopicOffsets, topic: str | None) -> TopicOffsets:
    return {name: parts for name, parts in offsets.items() if name != topic}


def read_offsets(path: Path) -> TopicOffsets:
    """Offsets of `behaviours` from a JSON file, from a manifest, or from a report. Raises `Misconfigured`.

    Whoever begins anew needs every item's vector: where `embeddings` stood then plays no part.
    """
    try:
        held = json.loads(path.read_text())
        held = held.get("offsets", held)
        return {"behaviours": {int(number): int(offset) for number, offset in held["behaviours"].items()}}
    except FileNotFoundError:
        raise Misconfigured(f"offsets file {path} does not exist (--from-offsets)") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Misconfigured(
            f'{path} (--from-offsets) is not like {{"behaviours": {{"0": 1200, "1": 1170}}}}: {error!r}'
        ) from None


def make_snapshot_store(settings: Settings) -> CheckpointStore:
    """The snapshots that a trainer of these settings writes and goes on from."""
    folder = training_folder(settings)
    named = f"{folder} (MIM_TRAIN__SNAPSHOT_FOLDER)"
    artifacts = FolderArtifactStore(folder, entries="snapshots", pointer="current.json", named=named)
    return CheckpointStore(artifacts, keep=settings.train.keep_snapshots, named=named)


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


def _trainer_maker(settings: Settings) -> Any:
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
