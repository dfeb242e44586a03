"""Metrics: AUC, per-user AUC (GAUC), log-loss, NE, calibration, and paired bootstrap over users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_IMPRESSIONS = 500
MIN_USERS = 100
"""A bucket with fewer impressions, or fewer users with both labels, is not reported."""

_BLOCK_BYTES = 1 << 26
"""Size of the draws of a bootstrap that are in memory at a time."""

HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True)
class UserAuc:
    """AUC of each user who has both labels, with their number of impressions."""

    users: NDArray[np.int64]
    auc: NDArray[np.float64]
    impressions: NDArray[np.int64]

    @property
    def weighted(self) -> float:
        """GAUC: mean over users, weighted by impressions."""
        return float(np.average(self.auc, weights=self.impressions)) if len(self.auc) else float("nan")

    @property
    def unweighted(self) -> float:
        """Plain mean over users."""
        return float(self.auc.mean()) if len(self.auc) else float("nan")


def auc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Area under the ROC curve, ties count one half; NaN if only one label occurs."""
    by_user = user_auc(np.zeros(len(labels), np.int64), labels, scores)
    return float(by_user.auc[0]) if len(by_user.auc) else float("nan")


def user_auc(users: NDArray[np.int64], labels: NDArray[np.int64], scores: NDArray[np.float64]) -> UserAuc:
    """AUC per user over the whole set (not per batch); users with one label only are left out.

    Vectorised rank statistic: U = sum of the positives' mid-ranks - n_pos (n_pos + 1) / 2, AUC = U / (n_pos n_neg).
    """
    if not len(users):
        return UserAuc(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
    distinct, user = np.unique(users, return_inverse=True)
    user = user.reshape(-1)
    order = np.lexsort((scores, user))
    user, labels, scores = user[order], labels[order].astype(np.float64), scores[order]
    starts = np.searchsorted(user, np.arange(len(distinct)))
    rank = np.arange(len(user)) - starts[user] + 1.0
    new_tie = np.ones(len(user), bool)
    new_tie[1:] = (scores[1:] != scores[:-1]) | (user[1:] != user[:-1])
    tie = np.cumsum(new_tie) - 1
    mid_rank = (np.bincount(tie, rank) / np.bincount(tie))[tie]
    positives = np.bincount(user, labels)
    total = np.bincount(user)
    negatives = total - positives
    rank_sum = np.bincount(user, mid_rank * labels)
    both = (positives > 0) & (negatives > 0)
    u = rank_sum[both] - positives[both] * (positives[both] + 1) / 2
    return UserAuc(distinct[both], u / (positives[both] * negatives[both]), total[both])


def log_loss(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Mean binary cross-entropy in nats."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(labels == 1, np.log(p), np.log1p(-p))))


def normalised_entropy(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Log-loss over that of always predicting the share of positives (1 is no information); NaN if one label only.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook (ADKDD 2014), section 2.
    """
    share = float(np.mean(labels)) if len(labels) else 0.0
    if not 0 < share < 1:
        return float("nan")
    return log_loss(labels, probabilities) / float(-(share * np.log(share) + (1 - share) * np.log(1 - share)))


@dataclass(frozen=True)
class CalibrationBin:
    """A tenth of the impressions by predicted probability: mean prediction and share of positives."""

    impressions: int
    predicted: float
    observed: float

    def as_dict(self) -> dict[str, float | int]:
        """For reports."""
        return {"impressions": self.impressions, "predicted": self.predicted, "observed": self.observed}


def calibration(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], *, bins: int = 10
) -> list[CalibrationBin]:
    """Mean prediction and share of positives per decile of the predictions, lowest first; sizes differ by one."""
    order = np.argsort(probabilities, kind="stable")
    return [
        CalibrationBin(len(part), float(probabilities[part].mean()), float(labels[part].mean()))
        for part in np.array_split(order, bins)
        if len(part)
    ]


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval."""

    difference: float
    low: float
    high: float


def resampled_users(users: int, *, rng: np.random.Generator, rounds: int) -> Iterator[NDArray[np.int64]]:
    """How often each user is drawn in each round of a bootstrap, a block of rounds at a time, (R, users) each.

    All rounds at once would take 8 GB for a million users. The numbers are those of one block: the generator goes on
    where it was, and a block has whole fours of rows, which a matrix product takes at a time, so that sums over users
    have the same last digit.
    """
    block = max(1, _BLOCK_BYTES // (4 * 8 * users)) * 4
    for start in range(0, rounds, block):
        yield rng.multinomial(users, np.full(users, 1 / users), size=min(block, rounds - start))


def paired_gauc_difference(
    users: NDArray[np.int64],
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    baseline: NDArray[np.float64],
    *,
    rng: np.random.Generator,
    rounds: int = 1000,
) -> Interval | None:
    """GAUC of `scores` minus GAUC of `baseline` on the same rows, bootstrapped over users (percentile interval)."""
    ours, theirs = user_auc(users, labels, scores), user_auc(users, labels, baseline)
    if len(ours.auc) < 2:
        return None
    gain = (ours.auc - theirs.auc) * ours.impressions
    blocks = resampled_users(len(gain), rng=rng, rounds=rounds)
    differences = np.concatenate([draws_RU @ gain / (draws_RU @ ours.impressions) for draws_RU in blocks])
    low, high = np.percentile(differences, [2.5, 97.5])
    return Interval(ours.weighted - theirs.weighted, float(low), float(high))


@dataclass(frozen=True)
class ScoredRows:
    """Prequential scores, one entry per impression in training order."""

    user: NDArray[np.str_]
    item: NDArray[np.str_]
    occurred_at: NDArray[np.float64]
    label: NDArray[np.int64]
    age_seconds: NDArray[np.float64]
    """Item age at the impression; NaN where unknown, or where the row itself defines the publish time."""
    catalogue: NDArray[np.bool_]
    """Items of the stream's first 24 hours, which count as the older catalogue."""
    retaken: NDArray[np.bool_]
    scores: Mapping[str, NDArray[np.float64]]
    """Probability per variant."""

    def __len__(self) -> int:
        return len(self.label)

    @staticmethod
    def concatenate(parts: Sequence[ScoredRows]) -> ScoredRows:
        """One table out of several with the same variants."""
        return ScoredRows(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("user", "item", "occurred_at", "label", "age_seconds", "catalogue", "retaken")
            },
            scores={name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores},
        )


def buckets(rows: ScoredRows) -> dict[str, NDArray[np.bool_]]:
    """The rows of each reported bucket. Re-takes are in their own bucket alone."""
    first = ~rows.retaken
    aged = first & ~np.isnan(rows.age_seconds)
    young = aged & ~rows.catalogue
    return {
        "overall": first,
        "under_1h": young & (rows.age_seconds < HOUR),
        "under_24h": young & (rows.age_seconds < DAY),
        "older": aged & (rows.catalogue | (rows.age_seconds >= DAY)),
        "retaken": rows.retaken,
    }


Bucket = dict[str, float | int]


def prequential_report(rows: ScoredRows) -> dict[str, dict[str, Bucket | None]]:
    """Per variant and bucket {auc, gauc, logloss, impressions, users}; None where a bucket is too small."""
    _, user = np.unique(rows.user, return_inverse=True)
    user = user.reshape(-1)
    report: dict[str, dict[str, Bucket | None]] = {name: {} for name in rows.scores}
    for bucket, chosen in buckets(rows).items():
        for variant, scores in rows.scores.items():
            report[variant][bucket] = _bucket(user[chosen], rows.label[chosen], scores[chosen])
    return report


def paired_report(rows: ScoredRows, ours: str, theirs: str, *, rng: np.random.Generator) -> dict[str, Interval | None]:
    """bucket -> GAUC of `ours` minus `theirs` with its interval; None for buckets that are too small."""
    _, user = np.unique(rows.user, return_inverse=True)
    user = user.reshape(-1)
    report: dict[str, Interval | None] = {}
    for bucket, chosen in buckets(rows).items():
        if _bucket(user[chosen], rows.label[chosen], rows.scores[ours][chosen]) is None:
            report[bucket] = None
            continue
        report[bucket] = paired_gauc_difference(
            user[chosen], rows.label[chosen], rows.scores[ours][chosen], rows.scores[theirs][chosen], rng=rng
        )
    return report


def _bucket(user: NDArray[np.int64], label: NDArray[np.int64], score: NDArray[np.float64]) -> Bucket | None:
    per_user = user_auc(user, label, score)
    if len(label) < MIN_IMPRESSIONS or len(per_user.auc) < MIN_USERS:
        return None
    return {
        "auc": auc(label, score),
        "gauc": per_user.weighted,
        "logloss": log_loss(label, score),
        "impressions": len(label),
        "users": len(per_user.auc),
    }
