"""Wiring of `mimstream trainset`: the rows of a release, rebuilt from journal and click log."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured
from streams.broker.cluster import ClusterTopics
from streams.broker.forgotten import read_forgotten_users
from streams.settings import Settings
from streams.stores.artifacts.journal import KeptSegment, SegmentMeta
from streams.stores.artifacts.registry import find_release, open_registry
from streams.training.input import TrainingInput
from streams.wiring.training import describe_log, make_journal_store

if TYPE_CHECKING:
    from trainer.provenance.rebuild import Rebuild, TrainingRow

log = structlog.get_logger()

_MOST_EVENTS = 2_000
_PROGRESS_SECONDS = 2.0


def rebuild_release(
    settings: Settings, release: str, *, fetch_max_records: int | None
) -> tuple[dict[str, Any], list[TrainingRow]]:
    """Whether the rows that a release learned are verified, with what was counted; and these rows. Blocking.

    Raises `Misconfigured` if the release has no journal.
    """
    from trainer.provenance.rebuild import Rebuild, damaged_vectors
    from trainer.samples.join_rules import JoinRules

    manifest = find_release(open_registry(settings.models), release)
    if manifest.segment is None or manifest.rows_tree_sha256 is None:
        raise Misconfigured(
            f"release {manifest.release_id} was made before there was a journal: its rows are not known"
        )
    journal = make_journal_store(settings)
    kept = journal.load(manifest.segment)
    rebuild = Rebuild(kept.segment, JoinRules.kept(kept.meta.rules, sorted(kept.meta.begins), kept.meta.overtaken))
    log_now = describe_log(settings)
    problems = _other_log(kept.meta, log_now)
    if not problems:
        fetch = fetch_max_records or settings.train.fetch_max_records
        problems = asyncio.run(_read_log(settings, kept, rebuild, log_now, fetch))
    lost = damaged_vectors(kept.segment.vectors, journal.vectors(kept.meta))
    if lost:
        problems.append(f"vectors of {len(lost)} items are not archived any more, or are others: {', '.join(lost[:5])}")
    result = rebuild.verify(manifest.rows_tree_sha256)
    problems = [*result.problems, *problems]
    summary = {
        "release": manifest.release_id,
        "segment": kept.meta.segment_id,
        "rows": result.rows,
        "first_row": kept.segment.first_row,
        "steps": len(kept.segment.steps),
        "rebuilt": result.rebuilt,
        "erased": result.erased,
        "users": result.users,
        "vectors": len(kept.segment.vectors),
        "rows_tree_sha256": manifest.rows_tree_sha256,
        "verified": not problems,
        "problems": problems,
    }
    return summary, list(rebuild.rows())


def _other_log(meta: SegmentMeta, log_now: ClusterTopics) -> list[str]:
    if log_now.has_incarnations(meta.cluster_id, meta.topic_ids):
        return []
    return [
        f"the release was trained from other topics, in cluster {meta.cluster_id}; these here, in cluster "
        f"{log_now.cluster_id}, were created later or elsewhere (MIM_KAFKA__BOOTSTRAP_SERVERS, MIM_TOPICS__PREFIX)"
    ]


async def _read_log(
    settings: Settings, kept: KeptSegment, rebuild: Rebuild, log_now: ClusterTopics, fetch_max_records: int
) -> list[str]:
    """Feed the rebuild from where training began; what of it the log does not hold any more."""
    forgotten = await read_forgotten_users(
        settings.kafka, settings.topics, cluster_id=log_now.cluster_id, topic_id=log_now.topic_ids["behaviours"]
    )
    begins = kept.meta.begins
    reads = TrainingInput(
        settings.kafka,
        settings.topics,
        field_map=settings.record.field_map,
        encoder_version=None,
        fetch_max_records=fetch_max_records,
        buffered_records=max(1, min(settings.train.buffered_records, 10 * fetch_max_records)),
        idle_seconds=settings.train.idle_seconds,
        all_idle_seconds=settings.train.all_idle_seconds,
        open_transaction_seconds=settings.train.open_transaction_seconds,
        bounded=True,
        start_at={"behaviours": begins},
        lost_is_fatal=False,
        clock=time.time,
    )
    read, logged_at = 0, time.monotonic()
    try:
        await reads.open()
        while not rebuild.complete:
            await reads.fetch(embeddings=False, behaviours=True, wait_seconds=0.2)
            entries = reads.next_behaviours(_MOST_EVENTS)
            for entry in entries:
                event, place = entry.behaviour, (entry.partition, entry.offset)
                if event is not None and forgotten.erases(event.user_id, *place):
                    rebuild.erased(*place, event.user_id)
                elif event is not None:
                    rebuild.observe(*place, event, written_at=entry.written_at)
            rebuild.advance()
            read += len(entries)
            if time.monotonic() - logged_at >= _PROGRESS_SECONDS:
                logged_at = time.monotonic()
                log.info("trainset.reading", events=read)
            if reads.all_handed_out:
                rebuild.advance(everything=True)
                break
    finally:
        await reads.close()
    lost = {p: (begins[p], first) for p, first in reads.beginnings.items() if first > begins[p]}
    if lost and not rebuild.complete:
        spans = ", ".join(f"{first} to {now} of partition {p}" for p, (first, now) in sorted(lost.items()))
        return [f"the log does not hold offsets {spans} any more (MIM_TOPICS__BEHAVIOURS_RETENTION_DAYS)"]
    return []
