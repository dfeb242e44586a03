"""What the label of a row says: that the item was taken, or that its user rated it above what they gave before."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from trainer.datasets import parquet
from trainer.datasets.folder import DataSet, interaction_columns
from trainer.offline.event_index import EventIndex

LabelKind = Literal["takes", "ratings"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)

_ROUNDING = 1e-6
"""A rating this little above a mean equals it: sums of fractions round, and differently when later ones change."""


def read_ratings(data: DataSet, folder: Path) -> NDArray[np.float64] | None:
    """The rating of each interaction, NaN where it has none; None if the set has no such column."""
    if not data.interactions.rated:
        return None
    path = folder / "interactions.parquet"
    values = parquet.as_numbers(interaction_columns(folder, ["rating"])[0], path, "rating")
    return np.where(np.isfinite(values), values, np.nan)


def liked(data: DataSet, folder: Path) -> NDArray[np.float64]:
    """Per interaction 1 if its rating is above the mean of the user's earlier ratings, 0 if it is equal or below.

    NaN where there is no rating, or nobody rated anything before. Raises `Misconfigured` for a set without ratings.
    """
    ratings = read_ratings(data, folder)
    if ratings is None or np.isnan(ratings).all():
        raise Misconfigured(
            f"data set {data.name} has no ratings, so --labels ratings has nothing to judge by: give "
            "interactions.parquet a column 'rating' of numbers, or leave --labels out to judge by what was taken"
        )
    rows = data.interactions
    above = ratings - means_before(rows.user, rows.ts, ratings)
    return np.where(np.isnan(above), np.nan, above > _ROUNDING)


def means_before(
    user_N: NDArray[np.int64], second_N: NDArray[np.int64], rating_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean of the user's ratings of earlier seconds, of all users' where there are none, NaN where nobody has any."""
    known = ~np.isnan(rating_N)

    def mean(key_N: NDArray[np.int64]) -> NDArray[np.float64]:
        earlier = EventIndex(key_N[known], second_N[known], rating_N[known])
        count = earlier.count(key_N, second_N)
        return np.where(count > 0, earlier.total(key_N, second_N) / np.maximum(count, 1), np.nan)

    own_N = mean(user_N)
    return np.where(np.isnan(own_N), mean(np.zeros_like(user_N)), own_N)
