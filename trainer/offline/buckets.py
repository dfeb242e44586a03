"""Which impressions each reported bucket holds. Re-takes are in no bucket but their own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

HOUR, DAY = 3_600, 86_400
POPULARITY_TIERS = (1, 10, 100, 1_000)


@dataclass(frozen=True, eq=False)
class RowFacts:
    """What a report sorts N impressions by. Models never see it."""

    age_seconds_N: NDArray[np.float64]
    """Age of the item; NaN where it says nothing: unknown, or the publish time was inferred from this very take."""
    from_start_N: NDArray[np.bool_]
    """Items of the set's first 24 hours, which were there before; they count as older."""
    takes_before_N: NDArray[np.int64]
    """Takes of the item by anyone before the moment."""
    cold_N: NDArray[np.bool_]
    """Held out, or not taken before the test span."""
    retaken_N: NDArray[np.bool_]
    days_only: bool
    """Only the day of each take is known, so no age is below a day but that of the first day."""

    def __len__(self) -> int:
        return len(self.age_seconds_N)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> RowFacts:
        """These rows, in this order."""
        columns = {one.name: getattr(self, one.name)[rows] for one in fields(self) if one.name != "days_only"}
        return replace(self, **columns)


def buckets(facts: RowFacts) -> dict[str, NDArray[np.bool_]]:
    """Rows per bucket, in the order in which they are reported."""
    first = ~facts.retaken_N
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
    return chosen
