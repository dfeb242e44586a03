"""Metrics of one model's scores in one bucket, and intervals for it and against another model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.metrics import (
    MIN_IMPRESSIONS,
    MIN_USERS,
    Interval,
    UserAuc,
    auc,
    calibration,
    log_loss,
    normalised_entropy,
    resampled_users,
    user_auc,
)

ROUNDS = 1_000


@dataclass(frozen=True, eq=False)
class ScoredBucket:
    """One model's metrics and per-user AUC in one bucket."""

    figures: dict[str, Any]
    """auc, gauc, gauc_unweighted, logloss, ne, impressions, users, calibration."""
    per_user: UserAuc


def judge(
    users: NDArray[np.int64], labels: NDArray[np.int64], scores: NDArray[np.float64], *, calibrated: bool
) -> ScoredBucket | None:
    """All metrics of a bucket; None where it has under 500 impressions or under 100 users with both labels."""
    per_user = user_auc(users, labels, scores)
    if len(labels) < MIN_IMPRESSIONS or len(per_user.auc) < MIN_USERS:
        return None
    figures: dict[str, Any] = {
        "auc": auc(labels, scores),
        "gauc": per_user.weighted,
        "gauc_unweighted": per_user.unweighted,
        "logloss": log_loss(labels, scores) if calibrated else None,
        "ne": normalised_entropy(labels, scores) if calibrated else None,
        "impressions": len(labels),
        "users": len(per_user.auc),
        "calibration": [one.as_dict() for one in calibration(labels, scores)] if calibrated else None,
    }
    return ScoredBucket(figures, per_user)


class Bootstrap:
    """Bootstrap samples of the users of one bucket, the same for every model, for paired comparisons.

    Source: percentile interval of the bootstrap over users (Efron and Tibshirani, 1993).
    """

    def __init__(self, per_user: UserAuc, *, rng: np.random.Generator, rounds: int = ROUNDS) -> None:
        self._users = per_user.users
        self._impressions = per_user.impressions.astype(np.float64)
        # a user is drawn once a round on average, and never 256 times
        self._draws = [
            block_RU.astype(np.uint8) for block_RU in resampled_users(len(self._users), rng=rng, rounds=rounds)
        ]
        self._weights = self._summed(self._impressions)

    def interval(self, one: UserAuc) -> tuple[float, float]:
        """95 % interval of a GAUC."""
        return self._percentiles(one.auc, one)

    def difference(self, ours: UserAuc, theirs: UserAuc) -> Interval:
        """GAUC of ours minus theirs with its 95 % interval."""
        self._check(theirs)
        low, high = self._percentiles(ours.auc - theirs.auc, ours)
        return Interval(ours.weighted - theirs.weighted, low, high)

    def _percentiles(self, values: NDArray[np.float64], of: UserAuc) -> tuple[float, float]:
        self._check(of)
        low, high = np.percentile(self._summed(values * self._impressions) / self._weights, [2.5, 97.5])
        return float(low), float(high)

    def _summed(self, values_U: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over the users drawn, of each round."""
        return np.concatenate([block_RU @ values_U for block_RU in self._draws])

    def _check(self, one: UserAuc) -> None:
        if not np.array_equal(one.users, self._users):
            raise ValueError("these figures are of other users than those that were drawn")


def mean_over_seeds(seeds: list[UserAuc]) -> UserAuc:
    """The AUC of each user, averaged over seeds of one model, for comparisons of models."""
    return UserAuc(seeds[0].users, np.mean([one.auc for one in seeds], axis=0), seeds[0].impressions)
