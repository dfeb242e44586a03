"""Small data-set folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400
WORDS = ["red dress", "blue jeans", "grey coat", "green hat"]


def write(folder: Path, name: str, **columns: Any) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def write_stream(folder: Path, *, users: int = 2_000, items: int = 400, takes: int = 16_000, seed: int = 0) -> Path:
    """Ratings over thirty days to the second. New items appear all the time; users keep to one or two categories."""
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.choice(30 * DAY, takes, replace=False)) + 1_000_000
    appears = np.sort(rng.integers(0, 30 * DAY, items)) + 1_000_000
    appears[:20] = 1_000_000
    weight = rng.pareto(2.0, items) + 0.5
    category = rng.integers(0, len(WORDS), items)
    likes = rng.integers(0, len(WORDS), users)
    taken: set[tuple[int, int]] = set()
    rows = []
    chances = np.stack([weight * np.where(category == one, 4.0, 1.0) for one in range(len(WORDS))])
    summed = np.cumsum(chances, axis=1)  # items appear in order, so those that are there are a prefix
    for now in ts:
        user = int(rng.integers(users))
        there = summed[likes[user], : np.searchsorted(appears, now, side="right")]
        item = int(np.searchsorted(there, rng.random() * there[-1]))
        if (user, item) not in taken:
            taken.add((user, item))
            rows.append((int(now), user, item, int(rng.integers(1, 11))))
    when, who, what, rating = (list(column) for column in zip(*rows, strict=True))
    first = {item: now for now, _, item, _ in reversed(rows)}
    known = sorted(first)
    write(
        folder,
        "items",
        item_id=known,
        title=[f"{WORDS[category[item]]} {item}" for item in known],
        category=[WORDS[category[item]] for item in known],
        publish_ts=[first[item] for item in known],
        genres=[f"{WORDS[category[item]].replace(' ', ', ')}" for item in known],
        year=[2000 + item % 20 for item in known],
        diag_n_interactions=[what.count(item) for item in known],
        cold_holdout=[item % 10 == 3 for item in known],
    )
    write(folder, "interactions", user_id=who, item_id=what, ts=when, rating=rating, label=[int(r > 6) for r in rating])
    return folder


def write_days(folder: Path, *, users: int = 200, items: int = 60, days: int = 7, seed: int = 0) -> Path:
    """Purchases by the day, some of them repeated, with given negatives of the same day."""
    rng = np.random.default_rng(seed)
    category = rng.integers(0, len(WORDS), items)
    likes = rng.integers(0, len(WORDS), users)
    bought: set[tuple[int, int, int]] = set()
    for user in range(users):
        for day in range(days):
            for _ in range(int(rng.integers(0, 3))):
                fits = np.where(category == likes[user], 6.0, 1.0)
                bought.add((day, user, int(rng.choice(items, p=fits / fits.sum()))))
    rows = sorted(bought)
    ever = {(user, item) for _, user, item in rows}
    negatives = []
    for day, user, _ in rows:
        for item in rng.permutation(items)[:8]:
            if (user, int(item)) not in ever:
                negatives.append((day, user, int(item)))
    first = {item: day for day, _, item in reversed(rows)}
    known = sorted(first)
    write(
        folder,
        "items",
        item_id=known,
        title=[f"{WORDS[category[item]]} {item}" for item in known],
        category=[WORDS[category[item]] for item in known],
        publish_ts=[first[item] * DAY for item in known],
        price=[1.0 + item for item in known],
        cold_holdout=[item % 10 == 3 for item in known],
    )
    days_, users_, items_ = (list(column) for column in zip(*rows, strict=True))
    write(folder, "interactions", user_id=users_, item_id=items_, ts=[day * DAY for day in days_], qty=[1] * len(rows),
          label=[1] * len(rows))  # fmt: skip
    kept = [row for row in negatives if row[2] in first]
    days_, users_, items_ = (list(column) for column in zip(*kept, strict=True))
    write(folder, "sampled_negatives", user_id=users_, item_id=items_, ts=[day * DAY for day in days_],
          neg_type=["pop"] * len(kept))  # fmt: skip
    return folder
