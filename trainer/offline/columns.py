"""Rows of a folder to columns: impressions with history and features as of their second."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.datasets.exposures import (
    NEGATIVES_PER_TAKE,
    defining_interactions,
    negatives_beside,
    of_rows_beside,
    sources_of_draws,
)
from trainer.datasets.folder import DAY_SECONDS, DataSet
from trainer.datasets.queries import Queries, has_triggers
from trainer.datasets.spans import Span
from trainer.features.config import FeatureConfig
from trainer.offline.as_of import DrawnFrom, ItemFacts, Takes
from trainer.offline.buckets import RowFacts
from trainer.offline.data import Histories, ImpressionColumns, ItemColumns
from trainer.offline.event_index import EventIndex
from trainer.offline.facets import Facet, further_columns
from trainer.offline.features import features
from trainer.offline.labels import LabelKind, liked, means_before, read_ratings
from trainer.offline.live_features import STEP_ROWS, FixedItems, folder_facts, live_features, state_leaks
from trainer.offline.protocols import Protocol
from trainer.offline.searched import searched_columns, seen_queries
from trainer.samples.id_hashes import hash_columns
from trainer.samples.searches import QUERY_COLUMNS

EXPOSURE_SEED = 0
"""Seed of the exposures that are drawn where a set has none, the same for every model and run."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Impressions from the first training row on, without vectors. Rows and facts are parallel."""

    items: ItemColumns
    """`vectors_EIV` has no versions yet."""
    histories: Histories
    rows: ImpressionColumns
    facts: RowFacts
    held_out_N: NDArray[np.bool_]
    """Rows of held-out items."""
    only_cold: bool
    """Only cold items are evaluated."""
    drawn_from: str | None
    """Source of the exposures that were not taken, as text."""
    labels: LabelKind = "takes"
    leaks: tuple[str, ...] = ()
    """What features know that they may not."""

    @property
    def reads_searches(self) -> bool:
        """Whether rows see what was searched or looked at before."""
        return self.rows.query_N is not None or self.rows.trigger_N is not None

    def learned_from(self, span: Span) -> NDArray[np.bool_]:
        """Rows of a span that models are trained on.

        Without held-out items and re-takes: no drawn negative is a re-take, so re-takes would leak the label.
        """
        return np.asarray(span.holds(self.rows.second_N) & ~self.held_out_N & ~self.rows.retaken_N)

    def judged_by(self, span: Span) -> NDArray[np.bool_]:
        """Rows of a span that models are evaluated on: all, or the cold ones alone under the protocol `cold`."""
        return np.asarray(span.holds(self.rows.second_N) & (self.facts.cold_N | (not self.only_cold)))


def read_columns(
    protocol: Protocol,
    folder: Path,
    *,
    labels: LabelKind = "takes",
    live: FeatureConfig | None = None,
    outcomes: Collection[str] = (),
    step_rows: int = STEP_ROWS,
) -> Recorded:
    """Build the columns of a folder under a protocol.

    The rows are takes and exposures, or with `labels` ratings the rated takes alone. A take has the same history and
    features in both.

    With `live` the features are those of a live trainer with steps of `step_rows`, which never sees the attributes
    `outcomes`; else exact ones over all takes before a row. What was searched and looked at before is read where the
    folder says it, as a live trainer reads it: features of searches are among the live ones, and only those see trigger
    items. Raises `Misconfigured` if there are no ratings to judge by.
    """
    log, data = protocol.log, protocol.log.data
    day_resolution = data.day_resolution
    inferred_from = defining_interactions(log.ts, log.ts, log.item - 1, data.publish_ts)
    if day_resolution:
        # features exclude the same day anyway, so the first take is like the day's others
        inferred_from = np.zeros(len(log.ts), bool)
    queries = Queries.of(data)
    taken = data.interactions.taken & ~_invisible(protocol)
    takes = Takes(
        log.user[taken],
        log.item[taken],
        log.ts[taken],
        _ratings(data, folder, taken),
        inferred_from[taken],
        _queries_of(data, queries)[taken] if len(queries) else None,
        None if data.interactions.trigger is None else data.interactions.trigger[taken] + 1,
    )
    liked_T = None
    if labels == "ratings":
        liked_T = liked(data, folder)
        step_rows = max(1, step_rows // (1 + NEGATIVES_PER_TAKE))  # as many takes as a step has beside exposures
    shown, drawn_from = _impressions(protocol, inferred_from, liked_T)
    user, item, second = shown.user_N, shown.item_N, shown.second_N
    length = EventIndex(takes.user_T, takes.second_T).count(user, second)
    by_user = np.lexsort((takes.second_T, takes.user_T))
    histories = Histories.of(takes.user_T[by_user], takes.item_T[by_user], takes.second_T[by_user])
    start = np.searchsorted(takes.user_T[by_user], user)
    everything = len(data.item_ids) + 1
    all_takes = data.interactions.taken
    mine = EventIndex(log.user[all_takes] * everything + log.item[all_takes], log.ts[all_takes])
    rows = ImpressionColumns(
        user_N=user,
        item_N=item,
        second_N=second,
        label_N=shown.label_N,
        retaken_N=mine.count(user * everything + item, second) > 0,
        history_start_N=start,
        history_stop_N=start + length,
        encoder_N=protocol.encoder_of(second),
        dense_NF=np.zeros((len(user), 0), np.float32),
        dense_names=(),
        query_N=seen_queries(queries, shown.search_N, user, second, data.user_ids) if len(queries) else None,
        trigger_N=_triggers(protocol, shown.trigger_N) if has_triggers(data) else None,
    )
    facets, numbers = further_columns(data, folder)
    facts_of_items = _item_facts(protocol, inferred_from, facets, _numbers(data) | numbers)
    place = np.where(taken, np.cumsum(taken) - 1, -1)  # row of the file to position in the takes
    sources = DrawnFrom.of(np.where(shown.source_N >= 0, place[shown.source_N], -1), takes)
    leaks: list[str] = []
    if live is None:
        dense, names = features(rows, histories, takes, facts_of_items, sources, day_resolution=day_resolution)
    else:
        if len(queries):
            live = live.model_copy(update={"queries": True})
        known = folder_facts(live, data, outcomes=outcomes, queries=len(queries))
        items, names = FixedItems(_hashes(data, queries), known), live.names
        dense = live_features(
            live, items, rows, histories, takes, sources, unpaired_I=log.held_out, step_rows=step_rows
        )
        leaks = state_leaks(live, dense, rows, takes, sources, step_rows=step_rows)
    if rows.query_N is not None:
        dense = np.concatenate([dense, searched_columns(queries, data, rows.query_N, item)], axis=1)
        names = (*names, *QUERY_COLUMNS)
    rows = replace(rows, dense_NF=dense, dense_names=names)
    age = (second - facts_of_items.published_I[item]).astype(float)
    facts = RowFacts(
        age_seconds_N=np.where(shown.defines_N | (age < 0), np.nan, age),
        from_start_N=facts_of_items.from_start_I[item],
        takes_before_N=EventIndex(takes.item_T, takes.second_T).count(item, second),
        cold_N=log.cold(protocol.test)[item],
        with_history_N=length > 0,
        retaken_N=rows.retaken_N,
        days_only=day_resolution,
    )
    return Recorded(
        _item_columns(protocol, facts_of_items, queries),
        histories,
        rows,
        facts,
        log.held_out[item],
        protocol.name == "cold",
        drawn_from,
        labels,
        tuple(leaks),
    )


@dataclass(frozen=True, eq=False)
class _Shown:
    """Impressions in order of time."""

    user_N: NDArray[np.int64]
    item_N: NDArray[np.int64]
    second_N: NDArray[np.int64]
    label_N: NDArray[np.int8]
    defines_N: NDArray[np.bool_]
    """The row defines its item's publish time."""
    source_N: NDArray[np.int64]
    """The interaction that an exposure was drawn from, -1 for none."""
    search_N: NDArray[np.int64]
    """Place in the set's searches, -1 for none."""
    trigger_N: NDArray[np.int64]
    """Number of the item looked at just before, 0 for none."""


def _impressions(
    protocol: Protocol, inferred_from: NDArray[np.bool_], liked_T: NDArray[np.float64] | None
) -> tuple[_Shown, str | None]:
    """Impressions from the first training second on, and the source of exposures as text.

    With `liked_T` (1, 0, NaN for no row) as labels there are no exposures.
    """
    log, data = protocol.log, protocol.log.data
    other_user = other_item = other_second = beside = np.zeros(0, np.int64)
    drawn_from = None
    if liked_T is None:
        other_user, other_item, other_second, beside, _, drawn_from = negatives_beside(data, log.ts, EXPOSURE_SEED)
    ones = data.interactions.taken if liked_T is None else liked_T == 1
    if data.day_resolution:
        other_second = other_second - other_second % DAY_SECONDS
    user = np.concatenate([log.user, other_user])
    item = np.concatenate([log.item, other_item + 1])
    second = np.concatenate([log.ts, other_second])
    label = np.concatenate([ones, np.zeros(len(other_user), bool)]).astype(np.int8)
    defines = np.concatenate([inferred_from, np.zeros(len(other_user), bool)])
    source = np.full(len(user), -1)
    if data.negatives is None and len(other_user):
        source[len(log.user) :] = sources_of_draws(log.ts, log.item, beside, other_item + 1, seed=EXPOSURE_SEED)
    wanted = second >= protocol.train.start
    if liked_T is not None:
        wanted &= ~np.isnan(liked_T)
    kept = np.flatnonzero(wanted)
    # a fixed order inside a second would leak the label
    shuffle = np.random.default_rng([EXPOSURE_SEED, 29]).permutation(len(kept))
    kept = kept[np.lexsort((shuffle, second[kept]))]
    rows, given = data.interactions, data.negatives if liked_T is None else None
    search = of_rows_beside(rows.search, None if given is None else given.search, beside, len(rows))
    trigger = of_rows_beside(rows.trigger, None if given is None else given.trigger, beside, len(rows))
    searches, triggers = np.concatenate(search)[kept], np.concatenate(trigger)[kept] + 1
    return (
        _Shown(user[kept], item[kept], second[kept], label[kept], defines[kept], source[kept], searches, triggers),
        drawn_from,
    )


def _queries_of(data: DataSet, queries: Queries) -> NDArray[np.int64]:
    """The query of each interaction, 0 for none."""
    search = data.interactions.search
    return np.zeros(len(data.interactions), np.int64) if search is None else queries.numbers(search)


def _triggers(protocol: Protocol, trigger_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Trigger items that rows may see: under `cold` held-out ones are in no history."""
    return np.where(protocol.log.held_out[trigger_N], 0, trigger_N) if protocol.name == "cold" else trigger_N


def _invisible(protocol: Protocol) -> NDArray[np.bool_]:
    """Interactions that features and histories must not contain."""
    log = protocol.log
    return log.held_out[log.item] if protocol.name == "cold" else np.zeros(len(log.item), bool)


def _ratings(data: DataSet, folder: Path, chosen: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    ratings = read_ratings(data, folder)
    if ratings is None:
        return None
    ts = data.interactions.ts
    usual = np.nan_to_num(means_before(np.zeros_like(ts), ts, ratings))  # of what came before, never of the whole set
    return np.where(np.isnan(ratings), usual, ratings)[chosen]


def _item_facts(
    protocol: Protocol,
    inferred_from: NDArray[np.bool_],
    facets: dict[str, Facet],
    numbers: dict[str, NDArray[np.float64]],
) -> ItemFacts:
    log, data = protocol.log, protocol.log.data
    inferred = np.zeros(len(data.item_ids) + 1, bool)
    inferred[log.item[inferred_from]] = True
    return ItemFacts(
        published_I=np.concatenate([[0], data.publish_ts]),
        inferred_I=inferred,
        from_start_I=np.concatenate([[False], data.catalogue]),
        unpaired_I=log.held_out,
        category_I=_categories(data),
        numbers_I=numbers,
        facets=facets,
    )


def _categories(data: DataSet) -> NDArray[np.int64]:
    if "category" not in data.items.column_names:
        return np.zeros(len(data.item_ids) + 1, np.int64)
    names = [(name or "").strip().lower() for name in data.items["category"].to_pylist()]
    numbers = {name: number for number, name in enumerate(sorted(set(names) - {""}), 1)}
    return np.array([0, *(numbers.get(name, 0) for name in names)])


def _numbers(data: DataSet) -> dict[str, NDArray[np.float64]]:
    """Logarithm of the price, and decades since 2000; NaN where unknown."""
    price, year = [np.nan], [np.nan]
    for start in range(0, len(data.item_ids), 4_096):
        for record in data.records(start, start + 4_096):
            price.append(np.log(record.price) if record.price else np.nan)
            year.append(np.nan if record.year is None else (record.year - 2_000) / 10)
    return {"price": np.array(price, np.float64), "year": np.array(year, np.float64)}


def _item_columns(protocol: Protocol, facts: ItemFacts, queries: Queries) -> ItemColumns:
    """Items and queries without vectors. Attributes are standardised on the items published before the first row."""
    data = protocol.log.data
    records = data.records(0, len(data.item_ids))
    texts = ["", *(f"{record.title}. {record.text}".strip(". ") for record in records)]
    columns: dict[str, NDArray[np.float64]] = dict(facts.numbers_I)
    columns["title length"] = np.array([np.nan, *(np.log1p(len(record.title)) for record in records)])
    columns["text length"] = np.array([np.nan, *(np.log1p(len(one.text)) if one.text else np.nan for one in records)])
    known_then = protocol.log.published(protocol.encode)
    attributes: dict[str, NDArray[np.float64]] = {}
    for name, values in columns.items():
        known = np.isfinite(values)
        sample = values[known & known_then]
        if not len(sample):
            continue
        attributes[name] = np.where(known, (values - sample.mean()) / (sample.std() + 1e-6), 0.0)
        if not known[1:].all():
            attributes[f"{name} known"] = known.astype(float)
    size = len(texts) + len(queries)
    table = np.stack(list(attributes.values()), axis=1).astype(np.float32)
    return ItemColumns(
        item_ids=["", *data.item_ids, *queries.names],
        vectors_EIV=np.zeros((0, size, 0), np.float32),
        has_vector_EI=np.zeros((0, size), bool),
        hashes_I2=_hashes(data, queries),
        category_I=np.concatenate([facts.category_I, np.zeros(len(queries), facts.category_I.dtype)]),
        attributes_IA=np.concatenate([table, np.zeros((len(queries), table.shape[1]), np.float32)]),
        attribute_names=tuple(attributes),
        titles=[*texts, *queries.texts],
        queries=len(queries),
    )


def _hashes(data: DataSet, queries: Queries) -> NDArray[np.int64]:
    return np.concatenate([np.zeros((1, 2), np.int64), hash_columns([*data.item_ids, *queries.names])])
