"""Scores to figures: per model, seed and bucket, with intervals, and model against model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams.evaluation.study import Study, TestScores
from trainer.offline.buckets import buckets
from trainer.offline.judging import Bootstrap, ScoredBucket, judge, mean_over_seeds

REFERENCE = "ciubm"
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Figures:
    """What a study says; plain values, ready for JSON."""

    rows: list[dict[str, Any]]
    """model, seed, bucket, auc, gauc, gauc_unweighted, logloss, ne, impressions, users, ci_low, ci_high."""
    means: list[dict[str, Any]]
    """The same over seeds: means, the spread of GAUC over seeds, and the interval of the seed-averaged model."""
    paired: list[dict[str, Any]]
    """model, reference, bucket, difference, low, high: GAUC of the reference minus the model, user by user."""
    calibration: list[dict[str, Any]]
    """model, seed, and ten bins of the overall bucket."""
    too_small: list[str]
    """Buckets with under 500 impressions or under 100 users with both labels."""


def figures_of(study: Study, scores: Sequence[TestScores]) -> Figures:
    """Judge all scores of a study."""
    rows = study.recorded.rows
    facts = study.recorded.facts.select(study.test_rows)
    users, labels = rows.user_N[study.test_rows], rows.label_N[study.test_rows].astype(np.int64)
    models = list(dict.fromkeys(one.model for one in scores))
    reference = REFERENCE if REFERENCE in models else models[0]
    found = Figures([], [], [], [], [])
    for bucket, chosen in buckets(facts).items():
        judged: dict[str, list[ScoredBucket]] = {}
        draws: Bootstrap | None = None
        for one in scores:
            scored = judge(users[chosen], labels[chosen], one.score_N[chosen], calibrated=one.calibrated)
            if scored is None:
                break
            draws = draws or Bootstrap(scored.per_user, rng=np.random.default_rng([BOOTSTRAP_SEED, 41]))
            low, high = draws.interval(scored.per_user)
            bins = scored.figures.pop("calibration")
            found.rows.append(
                {
                    "model": one.model,
                    "seed": one.seed,
                    "bucket": bucket,
                    **scored.figures,
                    "ci_low": low,
                    "ci_high": high,
                }
            )
            if bucket == "overall" and bins:
                found.calibration.append({"model": one.model, "seed": one.seed, "bins": bins})
            judged.setdefault(one.model, []).append(scored)
        if draws is None:
            found.too_small.append(bucket)
            continue
        averaged = {model: mean_over_seeds([one.per_user for one in seeds]) for model, seeds in judged.items()}
        for model, seeds in judged.items():
            low, high = draws.interval(averaged[model])
            found.means.append({"model": model, "bucket": bucket, "seeds": len(seeds), **_mean(seeds),
                                "ci_low": low, "ci_high": high})  # fmt: skip
            if model != reference:
                gain = draws.difference(averaged[reference], averaged[model])
                found.paired.append({"model": model, "reference": reference, "bucket": bucket,
                                     "difference": gain.difference, "low": gain.low, "high": gain.high})  # fmt: skip
    return found


def _mean(seeds: Sequence[ScoredBucket]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, first in seeds[0].figures.items():
        values = [one.figures[name] for one in seeds]
        counted = name in ("impressions", "users")
        figures[name] = first if counted else None if first is None else float(np.mean(values))
    gauc = [one.figures["gauc"] for one in seeds]
    return figures | {"gauc_spread": float(np.std(gauc, ddof=1)) if len(gauc) > 1 else None}
