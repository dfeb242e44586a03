"""`mimstream trainset`: what a release was trained on, rebuilt from the click log, and whether it is really that."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import StoreUnavailable
from streams.runtime.terminal import say
from streams.settings import Settings
from streams.wiring.trainset import rebuild_release

if TYPE_CHECKING:
    from trainer.provenance.rebuild import TrainingRow


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
    summary, rows = rebuild_release(settings, options.release, fetch_max_records=options.fetch_max_records)
    if options.out is not None:
        _write_parquet(options.out, rows)
    if options.json:
        print(json.dumps(summary if options.out else summary | {"training_rows": [asdict(row) for row in rows]}))
    else:
        say(_as_text(summary, [] if options.out else rows))
    return 0 if summary["verified"] else 1


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
        "taken_as": pa.array([row.taken_as and row.taken_as.value for row in rows], pa.string()),
        "correction": pa.array([row.correction for row in rows], pa.bool_()),
        "history": pa.array([row.history for row in rows], pa.list_(pa.string())),
        "history_seconds": pa.array([row.history_seconds for row in rows], pa.list_(pa.int64())),
        "negatives": pa.array([row.negatives for row in rows], pa.list_(pa.string())),
    }
    try:
        pq.write_table(pa.table(columns), path)
    except OSError as error:
        raise StoreUnavailable("rows file", f"{path} (--out): {error}") from error


def _as_text(summary: dict[str, Any], rows: Sequence[TrainingRow]) -> str:
    lines = []
    for row in rows:
        moment = datetime.fromtimestamp(row.second, UTC).isoformat()
        past = ",".join(row.history) or "-"
        against = "-" if row.negatives is None else str(len(row.negatives))
        lines.append(f"{row.step}\t{moment}\t{row.event_id}\t{row.user_id}\t{row.item}\t{row.label}\t{past}\t{against}")
    if lines:
        lines.insert(0, "step\toccurred_at\tevent\tuser\titem\tlabel\thistory\tnegatives")
    lines.append(
        f"{summary['release']}: {summary['rows']} rows in {summary['steps']} steps, {summary['rebuilt']} rebuilt, "
        f"{summary['erased']} erased"
    )
    lines.append(
        f"verified: tree over {summary['users']} users' rows, negatives and {summary['vectors']} vectors is "
        f"{summary['rows_tree_sha256'][:16]}"
        if summary["verified"]
        else "NOT verified: " + "; ".join(summary["problems"])
    )
    return "\n".join(lines)
