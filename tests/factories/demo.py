"""A demo run in which everything adds up, and scored rows of its variants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from streams.demo.audit import Letters
from streams.demo.freshness import FreshnessReport
from streams.demo.load import LoadReport
from streams.demo.outcome import VARIANTS, DemoResult, Neighbours
from trainer.metrics import ScoredRows


def scored_rows(rows: int = 3_000, users: int = 150, *, better: float = 1.5) -> ScoredRows:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, rows)
    noise = {variant: rng.normal(size=rows) for variant in VARIANTS}
    return ScoredRows(
        user=np.array([f"u{number}" for number in rng.integers(0, users, rows)]),
        item=np.array([f"i{number}" for number in rng.integers(0, 50, rows)]),
        occurred_at=np.sort(rng.integers(0, 30 * 86_400, rows)).astype(float),
        label=label,
        age_seconds=rng.integers(0, 3 * 86_400, rows).astype(float),
        catalogue=np.zeros(rows, bool),
        retaken=np.arange(rows) % 100 == 0,
        scores={name: noise[name] + (better * label if name == "ciubm" else 0) for name in VARIANTS},
    )


def make_result(**changes: object) -> DemoResult:
    good = DemoResult(
        data="a set",
        pictures="drawn.",
        left_out=None,
        exposures="drawn by seed 0",
        seed=0,
        takes=100,
        items_published=12,
        items_encoded=10,
        items_searchable=10,
        behaviours_sent=600,
        behaviours_stored=594,
        accounts={"received": 600, "trained": 580, "late": 1, "duplicate": 2, "dead_lettered": 6, "pending": 11},
        letters=Letters(2, 6, {"items bad_image": 2, "behaviours not_json": 6}, 8, [], []),
        freshness=FreshnessReport([(float(s), 100.0 + s) for s in range(50)], resolution_ms=50),
        live=FreshnessReport([(float(s), 200.0 + s) for s in range(20)], resolution_ms=50),
        live_per_second=2.0,
        indexing_seconds=5.0,
        releases=4,
        load=LoadReport(100, [], [5.0, 6.0, 7.0], {"aa": 60, "bb": 40}, 4.0),
        sample_items=8,
        sample_cosine=0.99999,
        rows_sha256="ab" * 32,
        encoder_version="towers-1",
        consistency_level="Strong",
        wall_seconds=77.0,
        scored=scored_rows(),
        neighbours=[Neighbours("i3", [("i1", 0.9), ("i2", 0.8)])],
    )
    return replace(good, **changes)  # type: ignore[arg-type]
