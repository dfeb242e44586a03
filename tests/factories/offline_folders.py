"""Small data-set folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from trainer.datasets.folder import DataSet, open_data_set
from trainer.datasets.spans import BehaviourLog
from trainer.offline.columns import Recorded, read_columns
from trainer.offline.data import CtrData
from trainer.offline.labels import LabelKind
from trainer.offline.protocols import Protocol, ProtocolName, protocol_of

DAY = 86_400
START = 20_000 * DAY
"""The first second of these folders: a midnight in October 2024."""
WORDS = ["red dress", "blue jeans", "grey coat", "green hat"]


def write(folder: Path, name: str, row_group_size: int | None = None, **columns: Any) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=row_group_size)


def write_small_set(folder: Path) -> Path:
    """Three items and two users."""
    publish_ts = [START + 20, START + 10, START + DAY + 50]
    write(folder, "items", item_id=[7, 5, 9], title=["seven", "five", None], publish_ts=publish_ts, colour=[*"rgb"])
    ts = [START + 10, START + 20, START + DAY + 60]
    write(folder, "interactions", user_id=["b", "a", "b"], item_id=[5, 7, 9], ts=ts, label=[1, 0, 1])
    return folder


def real_set(name: str) -> DataSet:
    if not os.environ.get("MIM_TEST_DATA"):
        pytest.skip("MIM_TEST_DATA is not set")
    return open_data_set(Path(os.environ["MIM_TEST_DATA"]) / name)


def read_protocol(
    folder: Path, name: ProtocolName = "prequential", labels: LabelKind = "takes"
) -> tuple[Protocol, Recorded]:
    data = open_data_set(folder, attributes=("cold_holdout",))
    protocol = protocol_of(BehaviourLog.of(data, folder), name)
    return protocol, read_columns(protocol, folder, labels=labels)


def without_vectors(recorded: Recorded) -> CtrData:
    return CtrData(recorded.items, recorded.histories, recorded.rows)


def _write_items(folder: Path, first: dict[int, int], category: NDArray[np.int64], **more: Any) -> None:
    """Items by the second of their first interaction; `more` columns are functions of the item."""
    known = sorted(first)
    write(
        folder,
        "items",
        item_id=known,
        title=[f"{WORDS[category[item]]} {item}" for item in known],
        category=[WORDS[category[item]] for item in known],
        publish_ts=[first[item] for item in known],
        cold_holdout=[item % 10 == 3 for item in known],
        **{name: [value(item) for item in known] for name, value in more.items()},
    )


def write_stream(folder: Path, *, users: int = 2_000, items: int = 400, takes: int = 16_000, seed: int = 0) -> Path:
    """Ratings over thirty days to the second. New items appear all the time; users keep to one or two categories."""
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.choice(30 * DAY, takes, replace=False)) + START
    appears = np.sort(rng.integers(0, 30 * DAY, items)) + START
    appears[:20] = START
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
    _write_items(
        folder,
        first,
        category,
        genres=lambda item: WORDS[category[item]].replace(" ", ", "),
        year=lambda item: 2000 + item % 20,
        diag_n_interactions=what.count,
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
    shown = [(day, user, int(item)) for day, user, _ in rows for item in rng.permutation(items)[:8]]
    first = {item: START + day * DAY for day, _, item in reversed(rows)}
    _write_items(folder, first, category, price=lambda item: 1.0 + item)
    days_, users_, items_ = (list(column) for column in zip(*rows, strict=True))
    write(folder, "interactions", user_id=users_, item_id=items_, ts=[START + day * DAY for day in days_],
          qty=[1] * len(rows), label=[1] * len(rows))  # fmt: skip
    kept = [row for row in shown if row[1:] not in ever and row[2] in first]
    days_, users_, items_ = (list(column) for column in zip(*kept, strict=True))
    write(folder, "sampled_negatives", user_id=users_, item_id=items_, ts=[START + day * DAY for day in days_],
          neg_type=["pop"] * len(kept))  # fmt: skip
    return folder
