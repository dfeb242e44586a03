"""Data-set folders: items, pictures and interactions as parquet files, read column by column.

The format (further columns of `items.parquet` are attributes, see `attributes.py`; unknown ones elsewhere are ignored;
identifiers may be numbers or text, times are dates, Arrow timestamps or numbers since 1970 in UTC):

| file | needed columns | optional columns |
| --- | --- | --- |
| `items.parquet` | item_id, title, publish_ts | text, category, price, year or release_year |
| `images.parquet` (optional; may miss items) | item_id, image (encoded bytes) | |
| `interactions.parquet` (not for `import`) | user_id, item_id, ts, label | event_id, rating, qty, kind, searches |
| `exposures.parquet` or `sampled_negatives.parquet` (optional) | user_id, item_id, ts | label, neg_type, searches |
| `queries.parquet` (optional) | query_id | query_text, image (encoded bytes) |

A row with a `rating` is a take whatever its value; without a `rating` column `label` = 1 marks a take. Takes are what
`kind` says, else purchases where the set has `qty`, else clicks. Of `sampled_negatives.parquet` one `neg_type` is used.
Searches are `query_text` and `query_image`, or `query_id`; and `trigger_item`, the item looked at just before.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from encoders.base import ItemContent
from schemas.attributes import Attribute
from schemas.behaviours import BehaviourKind
from schemas.errors import Misconfigured
from trainer.datasets.attributes import NO_ATTRIBUTES, ItemAttributes, attribute_columns
from trainer.datasets.images import StoredImages
from trainer.datasets.parquet import (
    as_numbers,
    as_optional_positions,
    as_optional_texts,
    as_positions,
    as_seconds,
    as_texts,
    read_columns,
    refuse_rows,
    with_prices_and_years,
    with_texts,
    with_user,
)
from trainer.datasets.searches import SEARCH_COLUMNS, Searches

DAY_SECONDS = 86_400

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class ItemRecord:
    """One row of `items.parquet`, ready to be published."""

    item_id: str
    title: str
    text: str
    category: str | None
    price: float | None
    publish_ts: int
    """Seconds since 1970, UTC."""
    attributes: dict[str, Any]
    """Values of the `attributes` columns named when the set was opened, for example those of a title card."""
    year: int | None = None
    """Year of release or of the model."""
    described: dict[str, Attribute] = field(default_factory=dict)
    """What the further columns say, as messages carry it."""

    def described_without(self, outcomes: Container[str]) -> dict[str, Attribute]:
        """What they say, without those that are outcomes."""
        return {name: value for name, value in self.described.items() if name not in outcomes}

    def content(self, picture: bytes | None, outcomes: Container[str] = ()) -> ItemContent:
        """What an encoder sees of the item, with its encoded picture and without attributes that are `outcomes`."""
        return ItemContent(
            item_id=self.item_id,
            title=self.title,
            text=self.text,
            category=self.category,
            price=self.price,
            image=picture,
            year=self.year,
            attributes=self.described_without(outcomes),
        )


class Pictures(Protocol):
    """A source of item pictures."""

    def of(self, records: Sequence[ItemRecord]) -> list[bytes | None]:
        """Look up the encoded picture of each item, None where there is none."""
        ...


@dataclass(frozen=True)
class Interactions:
    """Interactions, one entry per row in file order; users and items are positions in the set's lists."""

    ts: Ints
    """Seconds since 1970 as in the file, not spread over the day."""
    user: Ints
    item: Ints
    taken: Flags
    event_id: NDArray[np.object_] | None
    """The platform's ids, where the file has them."""
    kind: BehaviourKind
    """The kind of the takes of this set, where rows do not say theirs."""
    rated: bool
    """Whether rows are ratings, so that every row is a take."""
    kinds: NDArray[np.object_] | None = None
    """The `BehaviourKind` of each take, where the file says it."""
    search: Ints | None = None
    """Each row's search as a place in `DataSet.searches`, -1 without one; None where the file has no searches."""
    trigger: Ints | None = None
    """The item looked at just before each row, -1 without one; None where the file does not say."""

    def __len__(self) -> int:
        return len(self.ts)

    def kind_of(self, row: int) -> BehaviourKind:
        """The kind of a take."""
        return self.kind if self.kinds is None else self.kinds[row]


@dataclass(frozen=True)
class Negatives:
    """Exposures of the set that were not taken."""

    ts: Ints
    user: Ints
    item: Ints
    source: str
    """The file, with the `neg_type` used if it has several."""
    simulated: bool
    """True for `sampled_negatives.parquet`, false for `exposures.parquet`."""
    search: Ints | None = None
    """As of the interactions; None where an exposure has the search of the take that it was shown beside."""
    trigger: Ints | None = None
    """Likewise."""


@dataclass(frozen=True)
class DataSet:
    """An opened folder. Items are sorted by (publish_ts, item_id); texts stay in Arrow memory until they are read."""

    name: str
    items: pa.Table
    item_ids: list[str]
    publish_ts: Ints
    user_ids: list[str]
    interactions: Interactions
    negatives: Negatives | None
    pictures: Pictures
    day_resolution: bool
    """Whether all interactions are at midnight, so that only their day is known."""
    attributes: tuple[str, ...] = ()
    """Further item columns copied into records as they are."""
    without_user: int = 0
    """Interactions and exposures that name no user; they are left out."""
    searches: Searches | None = None
    """What users searched for, where the set says it."""
    searches_unread: bool = False
    """The files say what was searched or looked at before, and the set was told to leave it out."""
    described: ItemAttributes = NO_ATTRIBUTES
    """Further item columns that are attributes of the items."""

    @property
    def start_ts(self) -> int:
        """The first second of the set."""
        starts = [int(times.min()) for times in (self.publish_ts, self.interactions.ts) if len(times)]
        return min(starts, default=0)

    @property
    def catalogue(self) -> Flags:
        """Per item: published in the set's first 24 hours, so its real age is unknown."""
        return np.asarray(self.publish_ts < self.start_ts + DAY_SECONDS)

    @property
    def left_out(self) -> str | None:
        """What the files hold and no run reads, in words; None if there is nothing."""
        found = [f"{self.without_user:,} rows without a user are left out"] if self.without_user else []
        return " and ".join(found + ["searches and trigger items are not read"] * self.searches_unread) or None

    def records(self, start: int, stop: int) -> list[ItemRecord]:
        """Items `start` to `stop` in publish order."""
        rows = self.items.slice(start, max(0, stop - start)).to_pylist()
        return [
            ItemRecord(
                item_id=row["item_id"],
                title=(row["title"] or "")[:2_000],
                text=(row.get("text") or "")[:20_000],
                category=(row.get("category") or "")[:200] or None,
                price=row.get("price"),
                publish_ts=int(row["publish_ts"]),
                attributes={name: row.get(name) for name in self.attributes},
                year=row.get("year") or row.get("release_year") or None,
                described=self.described.of(row),
            )
            for row in rows
        ]


def open_data_set(
    folder: Path,
    *,
    neg_type: str = "pop",
    behaviours: bool = True,
    attributes: Sequence[str] = (),
    pictures: Pictures | None = None,
) -> DataSet:
    """Read a data-set folder; pictures stay on disk.

    `behaviours=False` reads items alone. `attributes` are further columns of `items.parquet` to keep. `pictures`
    replaces `images.parquet`.

    Raises `Misconfigured` naming the file and the column if something needed is missing or of the wrong type.
    """
    if not folder.is_dir():
        raise Misconfigured(f"data set {folder} is not a folder")
    items = read_columns(
        folder / "items.parquet",
        ["item_id", "title", "publish_ts"],
        ["text", "category", "price", "year", "release_year", *attributes],
    )
    items = with_texts(items, folder / "items.parquet", ["item_id", "title", "text", "category"])
    items = with_prices_and_years(items, folder / "items.parquet")
    publish_ts = as_seconds(items, folder / "items.parquet", "publish_ts")
    items = items.set_column(items.schema.get_field_index("publish_ts"), "publish_ts", pa.array(publish_ts))
    described, further = attribute_columns(folder / "items.parquet")
    for name in further.column_names:
        if name not in items.column_names:
            items = items.append_column(name, further[name])
    items = items.sort_by([("publish_ts", "ascending"), ("item_id", "ascending")]).combine_chunks()
    item_ids: list[str] = items["item_id"].to_pylist()
    if len(set(item_ids)) != len(item_ids):
        raise Misconfigured(f"{folder / 'items.parquet'}: column 'item_id' holds the same item more than once")
    index = pa.array(item_ids, pa.string())
    if behaviours:
        searches = Searches(folder)
        interactions, users, nobodys = _read_interactions(folder, index, searches)
        negatives, users, shown_to_nobody = _read_negatives(folder, index, users, neg_type, searches)
    else:
        searches, nobodys, shown_to_nobody = None, 0, 0
        none = np.zeros(0, np.int64)
        users = pa.array([], pa.string())
        interactions = Interactions(none, none, none, none.astype(bool), None, BehaviourKind.CLICK, rated=False)
        negatives = None
    if pictures is None:
        path = folder / "images.parquet"
        pictures = StoredPictures(path) if path.exists() else NoPictures()
    return DataSet(
        name=folder.resolve().name,
        items=items,
        item_ids=item_ids,
        publish_ts=items["publish_ts"].to_numpy().astype(np.int64),
        user_ids=users.to_pylist(),
        interactions=interactions,
        negatives=negatives,
        pictures=pictures,
        day_resolution=len(interactions) > 0 and not np.any(interactions.ts % DAY_SECONDS),
        attributes=tuple(attributes),
        without_user=nobodys + shown_to_nobody,
        searches=searches,
        described=described,
    )


def interaction_columns(folder: Path, needed: list[str], optional: Sequence[str] = ()) -> tuple[pa.Table, int]:
    """Columns of `interactions.parquet` for the rows that `DataSet.interactions` has, and how many others there are."""
    return with_user(read_columns(folder / "interactions.parquet", ["user_id", *needed], optional))


def sample_users(data: DataSet, events: int, seed: int) -> Flags:
    """Sample whole users, in a fixed random order, until at most `events` takes remain (at least one user).

    Returns one flag per user. A sampled user keeps all rows, so that histories are complete.
    """
    takes = np.bincount(data.interactions.user[data.interactions.taken], minlength=len(data.user_ids))
    order = np.random.default_rng([seed, 11]).permutation(len(takes))
    kept = np.zeros(len(takes), dtype=bool)
    fitting = int(np.searchsorted(np.cumsum(takes[order]), events, side="right"))
    kept[order[: max(1, fitting)]] = True
    return kept


class NoPictures:
    """A set without pictures."""

    def of(self, records: Sequence[ItemRecord]) -> list[bytes | None]:
        """None for each item."""
        return [None] * len(records)


class StoredPictures:
    """`images.parquet`."""

    def __init__(self, path: Path, *, max_cached_bytes: int = 268_435_456) -> None:
        self._images = StoredImages(path, key="item_id", max_cached_bytes=max_cached_bytes)

    def __len__(self) -> int:
        return len(self._images)

    def of(self, records: Sequence[ItemRecord]) -> list[bytes | None]:
        """Look up the stored picture of each item."""
        return self._images.of([record.item_id for record in records])


def _read_interactions(folder: Path, item_index: pa.Array, searches: Searches) -> tuple[Interactions, pa.Array, int]:
    path = folder / "interactions.parquet"
    further = ["event_id", "rating", "qty", "kind", "trigger_item", *SEARCH_COLUMNS]
    table, without_user = interaction_columns(folder, ["item_id", "ts", "label"], further)
    users = as_texts(table, path, "user_id").combine_chunks().dictionary_encode()
    label = as_numbers(table, path, "label")
    rated = "rating" in table.column_names
    taken = np.ones(len(table), bool) if rated else label > 0
    event_id = None
    if "event_id" in table.column_names:
        event_id = np.array(as_texts(table, path, "event_id").to_pylist(), dtype=object)
        if len(set(event_id)) != len(event_id):
            raise Misconfigured(f"{path}: column 'event_id' holds the same id more than once")
    interactions = Interactions(
        ts=as_seconds(table, path, "ts"),
        user=users.indices.to_numpy().astype(np.int64),
        item=as_positions(table, path, "item_id", item_index, "items.parquet"),
        taken=taken,
        event_id=event_id,
        kind=BehaviourKind.PURCHASE if "qty" in table.column_names else BehaviourKind.CLICK,
        rated=rated,
        kinds=_kinds(table, path, taken),
        search=searches.places(table, path),
        trigger=_triggers(table, path, item_index),
    )
    return interactions, users.dictionary, without_user


def _read_negatives(
    folder: Path, item_index: pa.Array, users: pa.Array, neg_type: str, searches: Searches
) -> tuple[Negatives | None, pa.Array, int]:
    """The exposures, `users` with those behind them who have no interaction, and the number of rows without a user."""
    shown, sampled = folder / "exposures.parquet", folder / "sampled_negatives.parquet"
    path = shown if shown.exists() else sampled
    if not path.exists():
        return None, users, 0
    further = ["neg_type", "label", "trigger_item", *SEARCH_COLUMNS]
    table = read_columns(path, ["user_id", "item_id", "ts"], further, keep=("neg_type", neg_type))
    source = path.name
    if "neg_type" in table.column_names:
        source = f"{path.name}, neg_type={neg_type}"
        if not len(table):
            raise Misconfigured(f"{path}: column 'neg_type' never holds {neg_type!r}; choose one with --neg-type")
    if "label" in table.column_names:  # takes are in interactions.parquet already
        table = table.filter(pa.array(~(np.abs(as_numbers(table, path, "label")) > 0)))
    table, without_user = with_user(table)
    shown_to = as_texts(table, path, "user_id").unique()
    users = pa.concat_arrays([users, shown_to.filter(pc.is_null(pc.index_in(shown_to, value_set=users)))])
    negatives = Negatives(
        ts=as_seconds(table, path, "ts"),
        user=as_positions(table, path, "user_id", users, "interactions.parquet"),
        item=as_positions(table, path, "item_id", item_index, "items.parquet"),
        source=source,
        simulated=path == sampled,
        search=searches.places(table, path),
        trigger=_triggers(table, path, item_index),
    )
    return negatives, users, without_user


def _triggers(table: pa.Table, path: Path, item_index: pa.Array) -> Ints | None:
    if "trigger_item" not in table.column_names:
        return None
    return as_optional_positions(table, path, "trigger_item", item_index, "items.parquet")


def _kinds(table: pa.Table, path: Path, taken: Flags) -> NDArray[np.object_] | None:
    """The kind of each take."""
    if "kind" not in table.column_names:
        return None
    kinds = {kind.value: kind for kind in BehaviourKind if kind.is_take}
    names = as_optional_texts(table, path, "kind").fill_null("nothing").to_pylist()
    wrong = taken & np.array([name not in kinds for name in names], bool)
    refuse_rows(wrong, np.array(names, object), path, "kind", f"the kind of a take is one of {', '.join(kinds)}")
    return np.array([kinds.get(name, BehaviourKind.EXPOSURE) for name in names], object)
