"""`mimstream trainset`: what a release was trained on, rebuilt from the click log, and whether it is really that."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured, StoreUnavailable
from streams.broker.cluster import TRAINING_TOPICS, ClusterTopics, describe_topics
from streams.broker.forgotten import read_forgotten_users
from streams.settings import Settings
from streams.stores.artifacts.journal import KeptSegment, SegmentMeta
from streams.stores.artifacts.registry import find_release, open_registry
from streams.training.input import TrainingInput
from streams.wiring.training import make_journal_store
from trainer.samples.forgotten import ForgottenUsers

if TYPE_CHECKING:
    from trainer.provenance.rebuild import Rebuild, TrainingRow

log = structlog.get_logger()

_PORTION = 2_000
_PROGRESS_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="rebuild the rows that a release learned, and verify them")
    show.add_argument("release", metavar="RELEASE", help="release, or the head of its name (r000007)")
    show.add_argument("--json", action="store_true", help="print verdict and rows as one JSON document")
    show.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, as Parquet, and print the verdict")
    show.add_argument("--fetch-max-records", type=int, help="records to fetch at a time")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Rebuild, verify, show; 0 if everything is as it was trained, else 1."""
    from trainer.provenance.rebuild import Rebuild, damaged_vectors
    from trainer.samples.join_rules import JoinRules

    manifest = find_release(open_registry(settings.models), options.release)
    if manifest.segment is None or manifest.rows_tree_sha256 is None:
        raise Misconfigured(
            f"release {manifest.release_id} was made before there was a journal: its rows are not known"
        )
    journal = make_journal_store(settings)
    kept = journal.load(manifest.segment)
    rules = JoinRules.kept(kept.meta.rules, sorted(kept.meta.begins), kept.meta.overtaken)
    rebuild = Rebuild(kept.segment, rules)
    log_now = describe_topics(settings.kafka, settings.topics, TRAINING_TOPICS)
    problems = _other_log(kept.meta, log_now)
    if not problems:
        fetch = options.fetch_max_records or settings.train.fetch_max_records
        problems = asyncio.run(_read_log(settings, kept, rebuild, log_now, fetch))
    lost = damaged_vectors(kept.segment.vectors, journal.vectors(kept.meta))
    if lost:
        problems.append(f"vectors of {len(lost)} items are not archived any more, or are others: {', '.join(lost[:5])}")
    verdict = rebuild.verdict(manifest.rows_tree_sha256)
    problems = [*verdict.problems, *problems]
    told = {
        "release": manifest.release_id,
        "segment": kept.meta.segment_id,
        "rows": verdict.rows,
        "first_row": kept.segment.first_row,
        "steps": len(kept.segment.steps),
        "rebuilt": verdict.rebuilt,
        "erased": verdict.erased,
        "users": verdict.users,
        "vectors": len(kept.segment.vectors),
        "rows_tree_sha256": manifest.rows_tree_sha256,
        "verified": not problems,
        "problems": problems,
    }
    rows = list(rebuild.rows())
    if options.out is not None:
        _write_parquet(options.out, rows)
    if options.json:
        print(json.dumps(told if options.out else told | {"training_rows": [asdict(row) for row in rows]}))
    else:
        print(_for_people(told, [] if options.out else rows))
    return 0 if not problems else 1


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
    """Feed the rebuild from where training began; says what of it the log does not hold any more."""
    gone = await read_forgotten_users(
        settings.kafka, settings.topics, cluster_id=log_now.cluster_id, topic_id=log_now.topic_ids["behaviours"]
    )
    reads = TrainingInput(
        settings.kafka,
        settings.topics,
        field_map=settings.record.field_map,
        encoder_version=None,
        fetch_max_records=fetch_max_records,
        buffered_records=max(1, min(settings.train.buffered_records, 10 * fetch_max_records)),
        idle_seconds=settings.train.idle_seconds,
        bounded=True,
        start_at={"behaviours": kept.meta.begins},
        lost_is_fatal=False,
        clock=time.time,
    )
    read, told_at = 0, time.monotonic()
    try:
        await reads.open()
        while not rebuild.complete:
            await reads.fetch(embeddings=False, behaviours=True, wait_seconds=0.2)
            entries = reads.next_behaviours(_PORTION)
            _feed(rebuild, gone, entries)
            read += len(entries)
            if time.monotonic() - told_at >= _PROGRESS_SECONDS:
                told_at = time.monotonic()
                log.info("trainset.reading", events=read)
            if reads.all_handed_out:
                rebuild.advance(everything=True)
                break
    finally:
        await reads.close()
    lost = {p: (kept.meta.begins[p], first) for p, first in reads.beginnings.items() if first > kept.meta.begins[p]}
    if lost and not rebuild.complete:
        spans = ", ".join(f"{first} to {now} of partition {p}" for p, (first, now) in sorted(lost.items()))
        return [f"the log does not hold offsets {spans} any more (MIM_TOPICS__BEHAVIOURS_RETENTION_DAYS)"]
    return []


def _feed(rebuild: Rebuild, gone: ForgottenUsers, entries: Sequence[Any]) -> None:
    for entry in entries:
        behaviour = entry.behaviour
        if behaviour is None:
            continue
        if gone.erases(behaviour.user_id, entry.partition, entry.offset):
            rebuild.erased(entry.partition, entry.offset, behaviour.user_id)
        else:
            rebuild.observe(entry.partition, entry.offset, behaviour, written_at=entry.written_at)
    rebuild.advance()


def _write_parquet(path: Path, rows: Sequence[TrainingRow]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "step": pa.array([row.step for row in rows], pa.int64()),
        "partition": pa.array([row.place[0] for row in rows], pa.int32()),
        "offset": pa.array([row.place[1] for row in rows], pa.int64()),
        "event_id": pa.array([row.event_id for row in rows], pa.string()),
        "user_id": pa.array([row.user_id for row in rows], pa.string()),
        "item_id": pa.array([row.item for row in rows], pa.string()),
        "occurred_at": pa.array([row.second for row in rows], pa.timestamp("s", tz="UTC")),
        "label": pa.array([row.label for row in rows], pa.int8()),
        "correction": pa.array([row.correction for row in rows], pa.bool_()),
        "history": pa.array([row.history for row in rows], pa.list_(pa.string())),
        "history_seconds": pa.array([row.history_seconds for row in rows], pa.list_(pa.int64())),
        "negatives": pa.array([row.negatives for row in rows], pa.list_(pa.string())),
    }
    try:
        pq.write_table(pa.table(columns), path)
    except OSError as error:
        raise StoreUnavailable("rows file", f"{path} (--out): {error}") from error


def _for_people(told: dict[str, Any], rows: Sequence[TrainingRow]) -> str:
    lines = []
    for row in rows:
        moment = datetime.fromtimestamp(row.second, UTC).isoformat()
        past = ",".join(row.history) or "-"
        against = "-" if row.negatives is None else str(len(row.negatives))
        lines.append(f"{row.step}\t{moment}\t{row.event_id}\t{row.user_id}\t{row.item}\t{row.label}\t{past}\t{against}")
    if lines:
        lines.insert(0, "step\toccurred_at\tevent\tuser\titem\tlabel\thistory\tnegatives")
    lines.append(
        f"{told['release']}: {told['rows']} rows in {told['steps']} steps, {told['rebuilt']} rebuilt, "
        f"{told['erased']} erased"
    )
    lines.append(
        f"verified: tree over {told['users']} users' rows, negatives and {told['vectors']} vectors is "
        f"{told['rows_tree_sha256'][:16]}"
        if told["verified"]
        else "NOT verified: " + "; ".join(told["problems"])
    )
    return "\n".join(lines)
