"""What a demo run found: the figures of the report, and whether they add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.demo.audit import Letters
from streams.demo.freshness import FreshnessReport
from streams.demo.load import LoadReport
from trainer.metrics import Interval, ScoredRows, paired_report, prequential_report, user_auc

VARIANTS = ("ciubm", "din", "ciubm_shuffled")
COMPARISONS = (("ciubm", "din"), ("ciubm", "ciubm_shuffled"))
BUCKETS = ("overall", "under_1h", "under_24h", "older", "retaken")

MIN_SAMPLE_COSINE = 0.999
"""How close the center's vectors must be to fresh ones, which another device or number of threads rounds otherwise."""

Prequential = dict[str, dict[str, dict[str, float | int] | None]]
Intervals = dict[str, dict[str, Interval | None]]


@dataclass(frozen=True)
class Neighbours:
    """A new item with what the center holds nearest to it; for the report's pictures."""

    item_id: str
    near: list[tuple[str, float]]
    """(item id, cosine), nearest first, without itself."""


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report says."""

    data: str
    pictures: str
    """What the pictures are, in words."""
    exposures: str
    """Where exposures that led to nothing come from, in words."""
    left_out: str | None
    """What the data set holds and was not sent, in words."""
    seed: int
    takes: int
    """Takes in the replayed stream, before broken events."""
    items_published: int
    items_encoded: int
    items_searchable: int
    behaviours_sent: int
    behaviours_stored: int
    accounts: Mapping[str, int]
    """The trainer's: received = trained + late + duplicate + dead_lettered + pending."""
    letters: Letters
    freshness: FreshnessReport
    """While the replay ran as fast as the index worker kept up: mostly the time in its queue."""
    live: FreshnessReport
    """Afterwards, items published one by one at `live_per_second`."""
    live_per_second: float
    indexing_seconds: float
    """From the first item sent to the last one committed by the index worker."""
    releases: int
    load: LoadReport
    sample_items: int
    """Items whose vector was compared with a fresh encode."""
    sample_cosine: float
    """The smallest cosine among them."""
    rows_sha256: str
    encoder_version: str
    consistency_level: str
    wall_seconds: float
    scored: ScoredRows | None
    neighbours: list[Neighbours] = field(default_factory=list)
    draws_without_source: int = 0
    """Exposures that were drawn and do not say from which take."""
    skew: Mapping[str, Any] = field(default_factory=dict)
    """What `mimstream skew` says of the run."""

    @property
    def backend(self) -> str:
        """The vector store, with the consistency of its searches."""
        return f"Milvus Lite, consistency level {self.consistency_level}"

    @property
    def items_per_second(self) -> float:
        """Items encoded and written per second, while behaviours were replayed, trained and served beside them."""
        return self.items_encoded / self.indexing_seconds if self.indexing_seconds > 0 else 0.0

    def freshness_ms(self) -> dict[str, float | None]:
        """Percentiles from publish to searchable, in the flood of the replay."""
        return percentiles(self.freshness.milliseconds)

    def live_ms(self) -> dict[str, float | None]:
        """Percentiles from publish to searchable, of items published one by one."""
        return percentiles(self.live.milliseconds)

    def prequential(self) -> Prequential:
        """variant -> bucket -> figures, None where a bucket is too small."""
        if self.scored is None:
            return {variant: dict.fromkeys(BUCKETS) for variant in VARIANTS}
        return prequential_report(self.scored)

    def intervals(self) -> Intervals:
        """`ours-theirs` -> bucket -> difference of GAUC with its 95 % interval over users."""
        if self.scored is None:
            return {f"{ours}-{theirs}": dict.fromkeys(BUCKETS) for ours, theirs in COMPARISONS}
        rng = np.random.default_rng([self.seed, 23])
        return {f"{ours}-{theirs}": paired_report(self.scored, ours, theirs, rng=rng) for ours, theirs in COMPARISONS}

    def broken_promises(self) -> list[str]:
        """What does not add up, in words; empty if everything does."""
        letters, accounts = self.letters, self.accounts
        said = []
        if self.items_published != self.items_encoded + letters.items:
            said.append(
                f"{self.items_published} items were published, but {self.items_encoded} were encoded and "
                f"{letters.items} dead-lettered"
            )
        if self.items_searchable != self.items_encoded:
            said.append(f"{self.items_encoded} items were encoded, but {self.items_searchable} can be found")
        if self.behaviours_stored != self.behaviours_sent - letters.behaviours:
            said.append(
                f"{self.behaviours_sent} behaviours were sent and {letters.behaviours} dead-lettered, but "
                f"{self.behaviours_stored} are stored"
            )
        settled = {name: accounts[name] for name in ("trained", "late", "duplicate", "dead_lettered", "pending")}
        if self.behaviours_sent != sum(settled.values()):
            said.append(f"{self.behaviours_sent} behaviours were sent, but the trainer's accounts are {settled}")
        if accounts["dead_lettered"] != letters.behaviours:
            said.append(
                f"{letters.behaviours} behaviours were dead-lettered, but the trainer counted "
                f"{accounts['dead_lettered']}"
            )
        said += letters.missing[:5] + [f"an event that is good was refused: {one}" for one in letters.unexpected[:5]]
        if self.draws_without_source:
            said.append(
                f"{self.draws_without_source} exposures were drawn and do not name the take they were drawn from: "
                "popularity tells them from others, so no figure of this run can be trusted"
            )
        if self.skew.get("rows") and not self.skew["passed"]:
            named = ", ".join(list(self.skew["largest_differences"])[:5])
            said.append(
                f"of {self.skew['rows']} scored rows {self.skew['differing_rows']} had other features than the trainer "
                f"computes at the same state ({named})"
            )
        if self.load.failures:
            said.append(f"{len(self.load.failures)} score requests failed, the first: {self.load.failures[0]}")
        if lost := self.freshness.lost + self.live.lost:
            said.append(f"{lost} probed items could not be found in time")
        if self.sample_cosine < MIN_SAMPLE_COSINE:
            said.append(
                f"of {self.sample_items} sampled items one is held with a vector that has cosine "
                f"{self.sample_cosine:.5f} to a fresh encode"
            )
        return said

    def to_json(self, report: str) -> dict[str, Any]:
        """The report as one JSON object; the first keys are the stable ones."""
        latency = percentiles(self.load.latency_ms)
        return {
            "items_published": self.items_published,
            "items_encoded": self.items_encoded,
            "items_searchable": self.items_searchable,
            "items_dead_lettered": self.letters.items,
            "pictures_refused": self.letters.pictures,
            "behaviours_sent": self.behaviours_sent,
            "behaviours_stored": self.behaviours_stored,
            "behaviours_trained": self.accounts["trained"],
            "behaviours_late": self.accounts["late"],
            "behaviours_duplicate": self.accounts["duplicate"],
            "behaviours_dead_lettered": self.letters.behaviours,
            "behaviours_pending": self.accounts["pending"],
            "freshness_ms": self.freshness_ms(),
            "items_per_second": round(self.items_per_second, 2),
            "releases": self.releases,
            "releases_served": len(self.load.weights),
            "prequential": self.prequential(),
            "wall_seconds": round(self.wall_seconds, 2),
            "report": report,
            "intervals": {
                pair: {
                    bucket: None if one is None else {"difference": one.difference, "low": one.low, "high": one.high}
                    for bucket, one in by_bucket.items()
                }
                for pair, by_bucket in self.intervals().items()
            },
            "training_rows_sha256": self.rows_sha256,
            "dead_letters_by_reason": self.letters.by_reason,
            "broken_sent": self.letters.expected,
            "data": self.data,
            "seed": self.seed,
            "takes": self.takes,
            "exposures": self.exposures,
            "pictures": self.pictures,
            "encoder_version": self.encoder_version,
            "backend": self.backend,
            "freshness_probes": len(self.freshness.found_at),
            "freshness_live_ms": self.live_ms(),
            "freshness_live": {"per_second": self.live_per_second, "probes": len(self.live.found_at)},
            "score_requests": {
                "sent": self.load.requests,
                "failed": len(self.load.failures),
                "per_second": round(self.load.per_second, 2),
                "searches": dict(self.load.searches),
                "latency_ms": latency,
            },
            "sample": {"items": self.sample_items, "min_cosine": self.sample_cosine},
            "skew": dict(self.skew),
            "broken_promises": self.broken_promises(),
        }

    def gauc_over_time(self, parts: int = 12) -> list[tuple[float, dict[str, float]]]:
        """GAUC of equal parts of the scored rows: (event time of the part's middle, variant -> GAUC)."""
        if self.scored is None or len(self.scored) < 500:
            return []
        _, users = np.unique(self.scored.user, return_inverse=True)
        points = []
        for rows in np.array_split(np.flatnonzero(~self.scored.retaken), parts):
            if len(rows) < 100:
                continue
            gauc = {
                variant: user_auc(users[rows], self.scored.label[rows], scores[rows]).weighted
                for variant, scores in self.scored.scores.items()
            }
            points.append((float(np.median(self.scored.occurred_at[rows])), gauc))
        return points


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p95 and p99; None where nothing was measured."""
    if not values:
        return {"p50": None, "p95": None, "p99": None}
    return {f"p{share}": round(float(np.percentile(values, share)), 2) for share in (50, 95, 99)}
