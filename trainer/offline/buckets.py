"""The impressions of each reported bucket.

Re-takes, and impressions of users without a history, are in their own buckets alone: the comparison is of models that
read histories, and for a user without one all of them can tell is what everybody likes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

HOUR, DAY = 3_600, 86_400
POPULARITY_TIERS = (1, 10, 100, 1_000)


@dataclass(frozen=True, eq=False)
class RowFacts:
    """Columns by which a report groups N impressions. No model reads them."""

    age_seconds_N: NDArray[np.float64]
    """Age of the item; NaN where unknown, or where the publish time was inferred from this take."""
    from_start_N: NDArray[np.bool_]
    """Items of the set's first 24 hours, which count as older."""
    takes_before_N: NDArray[np.int64]
    """Takes of the item by all users before the impression."""
    cold_N: NDArray[np.bool_]
    """Held out, or not taken before the test span."""
    with_history_N: NDArray[np.bool_]
    """The user took something before."""
    retaken_N: NDArray[np.bool_]
    days_only: bool
    """Only the day of each take is known, so ages below a day occur on the first day alone."""

    def __len__(self) -> int:
        return len(self.age_seconds_N)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> RowFacts:
        """These rows, in this order."""
        columns = {one.name: getattr(self, one.name)[rows] for one in fields(self) if one.name != "days_only"}
        return replace(self, **columns)


def buckets(facts: RowFacts) -> dict[str, NDArray[np.bool_]]:
    """Rows per bucket, in the order in which they are reported."""
    first = facts.with_history_N & ~facts.retaken_N
    aged = first & ~np.isnan(facts.age_seconds_N)
    young = aged & ~facts.from_start_N
    age, taken = facts.age_seconds_N, facts.takes_before_N
    chosen = {"overall": first, "cold": first & facts.cold_N}
    if not facts.days_only:
        chosen["under_1h"] = young & (age < HOUR)
    chosen |= {
        "under_24h": young & (age < DAY),
        "under_7d": young & (age < 7 * DAY),
        "older": aged & (facts.from_start_N | (age >= 7 * DAY)),
        "never_taken": first & (taken == 0),
    }
    for low, high in zip(POPULARITY_TIERS, (*POPULARITY_TIERS[1:], None), strict=True):
        name = f"taken_{low}_to_{high - 1}" if high is not None else f"taken_{low}_and_more"
        chosen[name] = first & (taken >= low) & (taken < (high or np.inf))
    chosen["retaken"] = facts.retaken_N
    chosen["without_history"] = ~facts.with_history_N
    return chosen
