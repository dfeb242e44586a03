"""Pairs of the topics: mined behind the window and the join of the live trainer; the newest pairs judge the encoder."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.base import ItemContent
from encoders.feature_cache import content_key
from encoders.features import ItemFeatures
from encoders.fusion import Views
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import BundleBuilder
from streams.encoder_training.csft import PairData
from streams.encoder_training.topic_input import TopicContent
from trainer.csft import health
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import Pair, PairMiner, join_all
from trainer.offline import encoder_report
from trainer.samples.numbering import FeatureNumbers
from trainer.samples.window import EventWindow

VALIDATION_SHARE = 0.1
"""Share of the newest pairs, which nothing is learned from."""
ANCHORS = 10
"""Newest items of a pair's anchor that ask a question."""


def topic_pairs(
    read: TopicContent,
    builder: BundleBuilder,
    config: CsftConfig,
    *,
    name: str,
    lateness_seconds: float,
    attribution_seconds: float,
) -> PairData:
    """Compute the features and mine the pairs; queries stand behind the items, as items do.

    Raises `Misconfigured` if the topics hold too little to learn from.
    """
    contents = read.contents()
    items = len(contents)
    queries = _queries(read)
    asked = [ItemContent(title=query) if isinstance(query, str) else ItemContent(image=query) for query in queries]
    everything = [*contents, *asked]
    features = builder.features(everything)
    numbers = FeatureNumbers(
        [*(content.item_id for content in contents), *(f"\0query {place}" for place in range(len(queries)))],
        [content_key(content) for content in everything],
    )
    usable = np.arange(len(features) + 1) <= items  # a query is no negative
    usable[0] = False
    miner = PairMiner(numbers, queries={query: items + 1 + place for place, query in enumerate(queries)})
    seconds = in_event_time(read, lateness_seconds)
    impressions = join_all(
        seconds, numbers, history_length=config.history_length, attribution_seconds=attribution_seconds
    )
    pairs = list(miner.pairs(impressions))
    if len(pairs) < 20:
        raise Misconfigured(
            f"the topics hold {read.behaviours_read} behaviours of {items} items, which make {len(pairs)} pairs of "
            "something taken after something else; C-SFT needs at least 20"
        )
    cut = len(pairs) - max(1, round(VALIDATION_SHARE * len(pairs)))
    learned, held_back = pairs[:cut], pairs[cut:]

    return PairData(
        name=name,
        source="topics",
        contents=everything,
        features=features,
        fit_features=features,
        numbers=numbers,
        usable=usable,
        pairs=pairs,
        learned=learned,
        reports=lambda fusion, views, last: {"validation": _report(learned, held_back, usable, features, views)},
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
        },
    )


def _report(
    learned: list[Pair], held_back: list[Pair], usable: NDArray[np.bool_], features: ItemFeatures, views: Views
) -> dict[str, Any]:
    """Recall on the pairs that were held back, and geometry."""
    fused = np.where(usable[:, None], views.fused_ND.numpy(), 0).astype(np.float32)
    questions = health.Questions.of(
        [
            (pair.anchor[-ANCHORS:][::-1], pair.row.item, set(pair.anchor) - {pair.row.item})
            for pair in held_back
            if all(usable[item] for item in pair.anchor)
        ],
        width=ANCHORS,
    )
    cold = usable.copy()
    cold[sorted({pair.row.item for pair in learned})] = False
    counts = np.bincount([pair.row.item for pair in learned], minlength=len(usable))
    found: dict[str, Any] = {"geometry": asdict(health.geometry(fused[usable]))}
    if len(questions):
        frozen = encoder_report.frozen_vectors(features) * usable[:, None]
        for name, vectors in (("frozen", frozen.astype(np.float32)), ("trained", fused)):
            queries = health.queries(vectors, questions)
            recall = health.recall_at_k(queries, vectors, questions, cold, k=encoder_report.K)
            found[name] = {"next": recall.as_dict()}
        popular = health.popularity_recall(counts, questions, cold, k=encoder_report.K)
        found["popularity"] = {"next": popular.as_dict()}
    return found


def in_event_time(read: TopicContent, lateness_seconds: float) -> Any:
    """The log second by second, without repetitions and latecomers, as the live trainer orders it."""
    partitions = sorted({partition for partition, _, _ in read.behaviours} or {0})
    window = EventWindow(partitions, lateness_seconds=lateness_seconds, horizon_seconds=6 * 3600.0)
    for partition, offset, behaviour in read.behaviours:
        window.observe(partition, offset, behaviour)
    return window.released(everything=True)


def _queries(read: TopicContent) -> list[str | bytes]:
    """The distinct texts and pictures that users searched with, in their order."""
    queries = (query for _, _, event in read.behaviours for query in (event.query_text, event.query_image) if query)
    return list(dict.fromkeys(queries))
