"""Pairs of the topics: mined behind the window and the join of the live trainer; the newest pairs judge the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from encoders.base import ItemContent, query_content
from encoders.features import ItemFeatures
from schemas.errors import Misconfigured
from streams.encoder_training.csft import PairData
from streams.encoder_training.pair_report import pair_report
from streams.encoder_training.queries import items_and_queries
from streams.encoder_training.topic_input import TopicContent
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import AnchorKind, NoPair, PairMiner, join_all
from trainer.samples.config import JoinConfig
from trainer.samples.join_rules import JoinRules
from trainer.samples.window import EventWindow

VALIDATION_SHARE = 0.1
"""Share of the newest pairs, which nothing is learned from."""


def topic_pairs(
    read: TopicContent,
    features_of: Callable[[Sequence[ItemContent]], ItemFeatures],
    config: CsftConfig,
    *,
    name: str,
    log: JoinConfig,
) -> PairData:
    """Compute the features and mine the pairs; queries stand behind the items, as items do.

    `log` says how the log is joined; what a live trainer would correct is right from the start. Raises `Misconfigured`
    if the topics hold too little to learn from.
    """
    both = items_and_queries(read.contents(), _queries(read), features_of)
    items, features, numbers = both.items, both.features, both.numbers
    rules = JoinRules.of(log, ())
    miner = PairMiner(numbers, queries=both.known, take_seconds=rules.take_seconds)
    impressions = join_all(
        in_event_time(read, log.lateness_seconds),
        numbers,
        history_length=config.history_length,
        attribution_seconds=log.attribution_seconds,
        corrections=rules.corrections(),
    )
    pairs = list(miner.pairs(impressions))
    no_pair = {reason.value: miner.no_pair[reason] for reason in NoPair}
    if len(pairs) < 20:
        raise Misconfigured(
            f"the topics hold {read.behaviours_read} behaviours of {items} items, which make {len(pairs)} pairs of "
            "something taken after a search or after something else; C-SFT needs at least 20. Takes that make no pair: "
            + ", ".join(f"{count} {reason}" for reason, count in no_pair.items())
        )
    cut = len(pairs) - max(1, round(VALIDATION_SHARE * len(pairs)))
    learned, held_back = pairs[:cut], pairs[cut:]

    return PairData(
        name=name,
        source="topics",
        contents=both.contents,
        features=features,
        fit_features=features,
        numbers=numbers,
        usable=both.is_item,
        pairs=pairs,
        learned=learned,
        reports=lambda fusion, views, last: {
            "validation": pair_report(learned, held_back, items, features, views, anchor_view=config.anchor_view)
        },
        provenance={
            "first_event_at": datetime.fromtimestamp(pairs[0].row.second, UTC),
            "last_event_at": datetime.fromtimestamp(learned[-1].row.second, UTC),
            "offsets": read.offsets,
            "cluster_id": read.cluster_id,
        },
        counts={
            "offsets": read.offsets,
            "behaviours": read.behaviours_read,
            "broken": read.broken,
            "erased": read.erased,
            "anchors": {kind.value: sum(pair.anchor_kind is kind for pair in pairs) for kind in AnchorKind},
            "no_pair": no_pair,
            "unreadable_queries": both.unreadable,
        },
    )


def in_event_time(read: TopicContent, lateness_seconds: float) -> Any:
    """The log second by second, without repetitions and latecomers, as the live trainer orders it."""
    partitions = sorted({partition for partition, _, _ in read.behaviours} or {0})
    window = EventWindow(partitions, lateness_seconds=lateness_seconds, horizon_seconds=6 * 3600.0)
    for partition, offset, behaviour in read.behaviours:
        window.observe(partition, offset, behaviour)
    return window.released(everything=True)


def _queries(read: TopicContent) -> dict[str | bytes, ItemContent]:
    """The distinct texts and pictures that users searched with, in their order."""
    queries = (query for _, _, event in read.behaviours for query in (event.query_text, event.query_image) if query)
    return {
        query: query_content(query, None) if isinstance(query, str) else query_content(None, query)
        for query in dict.fromkeys(queries)
    }
