"""Reports of the running trainer: event counts and more as a small JSON file, prequential scores as parquet files."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from schemas.errors import StoreUnavailable
from streams.runtime.interval import IntervalTimer
from streams.training.scores import ScoreFiles
from trainer.samples.late_events import LateEvent

if TYPE_CHECKING:
    from trainer.metrics import ScoredRows
    from trainer.networks.trees import TreesReport

log = structlog.get_logger()

ACCOUNTS_FILE = "accounts.json"


@dataclass(frozen=True, slots=True)
class SkewReport:
    """One comparison of features that servers computed with the trainer's own."""

    rows: int
    differing: int
    """Rows of which a feature differs."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """The trainer at one moment; the fields are the keys of `accounts.json`."""

    accounts: Mapping[str, int]
    """received = trained + late + duplicate + dead_lettered + erased + pending."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """Accepted events by kind; without exposures there are no training rows."""
    late_by_partition: Mapping[int, int] = field(default_factory=dict)
    """Events of each partition that came too late."""
    late_events: Sequence[LateEvent] = ()
    """The newest of them."""
    offsets: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Next offset to read per topic (without prefix) and partition, such that everything below is settled."""
    corrected: int = 0
    """Rows learned as not taken that a late take has corrected: rows, but no events of their own."""
    upgraded: int = 0
    """Rows learned as taken that a later take of a more reliable kind has corrected; likewise no events."""
    takes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By kind, the takes of it or a more reliable one that were learned: known in time, and late."""
    takes_too_late: int = 0
    """Takes that name an exposure which is too old for them, or not known (any more): they correct nothing."""
    steps: int = 0
    rows_trained: int = 0
    rows_sha256: str = ""
    releases: int = 0
    """Releases made by this process that became current."""
    refused: int = 0
    """Candidates that the promotion gate kept back."""
    held: int = 0
    """Candidates that passed and did not become current, because a person had chosen otherwise."""
    release_id: str | None = None
    """The current release, as far as this process knows."""
    not_serving: str | None = None
    """Why the newest candidate of this process does not serve; None if it does, or if there was none."""
    last_event_at: int | None = None
    """Event time of the last trained row, in seconds since 1970."""
    waiting_for: int = 0
    """Items at the head of the stream whose vector has not come."""
    given_up: int = 0
    """Items whose vector was not waited for any longer."""
    trees: TreesReport | None = None
    """Boosted trees beside the network; None for a model without."""
    ids_forgotten: int = 0
    """Event ids forgotten early for want of MIM_TRAINER__DUPLICATE_MEGABYTES: repetitions of them count twice."""
    open_transactions: int = 0
    """Partitions whose newest records wait for a producer's transaction."""
    broken_vectors: int = 0
    """Records of `embeddings` that cannot be read."""
    other_encoders: int = 0
    """Records of `embeddings` of another encoder version; ignored."""
    prequential: Mapping[str, float | None] = field(default_factory=dict)
    """Running prequential metrics at the newest release."""
    updated_at: float = 0.0
    """Wall clock, in seconds since 1970."""


NO_COUNTS: Mapping[str, int] = dict.fromkeys(
    ("received", "trained", "late", "duplicate", "dead_lettered", "erased", "pending"), 0
)


class TrainReports:
    """Where reports and scored rows go: into files, where a `folder` and `scores` are given, and to callbacks."""

    def __init__(
        self,
        *,
        interval: IntervalTimer,
        folder: Path | None = None,
        scores: ScoreFiles | None = None,
        on_scored: Callable[[Sequence[ScoredRows]], None] = lambda scored: None,
        on_report: Callable[[TrainReport], None] = lambda report: None,
    ) -> None:
        self._interval = interval
        self._folder = folder
        self._scores = scores
        self._on_scored = on_scored
        self._on_report = on_report

    @property
    def due(self) -> bool:
        """Whether it is time for the next report."""
        return self._interval.passed

    async def add_scores(self, scored: Sequence[ScoredRows]) -> None:
        """Pass freshly scored rows on. Raises `StoreUnavailable`."""
        self._on_scored(scored)
        if self._scores is not None:
            await asyncio.to_thread(self._scores.add, scored)

    async def write(self, report: TrainReport) -> None:
        """Write the report, and the scores up to it; a disk that is full is logged and ends nothing."""
        self._interval.begin()
        try:
            if self._folder is not None:
                await asyncio.to_thread(write_report, self._folder, report)
            if self._scores is not None:
                await asyncio.to_thread(self._scores.flush)
        except StoreUnavailable as error:
            log.warning("train.not_reported", error=str(error))
        self._on_report(report)


def write_report(folder: Path, report: TrainReport) -> None:
    """Replace `accounts.json`: a reader sees the old text or the new one. Raises `StoreUnavailable`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{ACCOUNTS_FILE}-{os.getpid()}"
        fresh.write_text(json.dumps(asdict(report), indent=2))
        os.replace(fresh, folder / ACCOUNTS_FILE)
    except OSError as error:
        raise StoreUnavailable("state folder", f"{folder} (MIM_TRAIN__STATE_FOLDER): {error}") from error
