"""The click log of the topics as C-SFT sees it: the live trainer's window and join, pairs, features, questions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
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
from streams.encoder_training.topic_input import TopicContent
from trainer.csft import health
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import Pair, PairMiner, join_all
from trainer.samples.numbering import FeatureNumbers
from trainer.samples.window import EventWindow

VALIDATION_SHARE = 0.1
"""The newest pairs, which nothing is learned from: they judge the encoder."""


@dataclass(frozen=True, eq=False)
class TopicLog:
    """Pairs of the log in event-time order with the features of its items; queries stand among them as items do."""

    contents: list[ItemContent]
    """Items, then queries, as the features stand."""
    features: ItemFeatures
    numbers: FeatureNumbers
    usable: NDArray[np.bool_]
    """Per number: an item that may be a negative (a query may not)."""
    pairs: list[Pair]

    @staticmethod
    def of(
        read: TopicContent,
        workshop: BundleBuilder,
        config: CsftConfig,
        *,
        lateness_seconds: float,
        attribution_seconds: float,
    ) -> TopicLog:
        """Mine the log. Raises `Misconfigured` if it holds too little to learn from."""
        contents = read.contents()
        items = len(contents)
        queries = _queries(read)
        asked = [ItemContent(title=query) if isinstance(query, str) else ItemContent(image=query) for query in queries]
        everything = [*contents, *asked]
        features = workshop.features(everything)
        numbers = FeatureNumbers(
            [*(content.item_id for content in contents), *(f"\0query {place}" for place in range(len(queries)))],
            [content_key(content) for content in everything],
        )
        usable = np.arange(len(features) + 1) <= items
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
        return TopicLog(everything, features, numbers, usable, pairs)

    @property
    def _cut(self) -> int:
        return len(self.pairs) - max(1, round(VALIDATION_SHARE * len(self.pairs)))

    @property
    def learned(self) -> list[Pair]:
        """What is learned from."""
        return self.pairs[: self._cut]

    @property
    def first_event_at(self) -> datetime:
        """Event time of the first pair."""
        return datetime.fromtimestamp(self.pairs[0].row.second, UTC)

    @property
    def last_event_at(self) -> datetime:
        """Event time of the last pair that was learned from."""
        return datetime.fromtimestamp(self.learned[-1].row.second, UTC)

    def report(self, views: Views) -> dict[str, Any]:
        """Recall on the newest pairs, which were not learned from, and geometry."""
        from trainer.offline import encoder_report

        fused = np.where(self.usable[:, None], views.fused_ND.numpy(), 0).astype(np.float32)
        held_back = [p for p in self.pairs[self._cut :] if all(self.usable[item] for item in p.anchor)]
        questions = _questions(held_back)
        cold = self.usable.copy()
        cold[sorted({pair.row.item for pair in self.learned})] = False
        counts = np.bincount([pair.row.item for pair in self.learned], minlength=len(self.usable))
        found: dict[str, Any] = {
            "geometry": encoder_report.geometry_dict(health.geometry(fused[self.usable])),
        }
        if len(questions):
            frozen = encoder_report.frozen_vectors(self.features) * self.usable[:, None]
            for name, vectors in (("frozen", frozen.astype(np.float32)), ("trained", fused)):
                queries = health.queries(vectors, questions)
                recall = health.recall_at_k(queries, vectors, questions, cold, k=encoder_report.K)
                found[name] = {"next": recall.as_dict()}
            popular = health.popularity_recall(counts, questions, cold, k=encoder_report.K)
            found["popularity"] = {"next": popular.as_dict()}
        return found


def in_event_time(read: TopicContent, lateness_seconds: float) -> Any:
    """The log second by second, without repetitions and latecomers, as the live trainer orders it."""
    partitions: Collection[int] = sorted({partition for partition, _, _ in read.behaviours} or {0})
    window = EventWindow(partitions, lateness_seconds=lateness_seconds, horizon_seconds=6 * 3600.0)
    for partition, offset, behaviour in read.behaviours:
        window.observe(partition, offset, behaviour)
    return window.released(everything=True)


def _queries(read: TopicContent) -> list[str | bytes]:
    found: dict[str | bytes, None] = {}
    for _, _, behaviour in read.behaviours:
        for query in (behaviour.query_text, behaviour.query_image):
            if query:
                found[query] = None
    return list(found)


def _questions(pairs: list[Pair]) -> health.Questions:
    anchors = np.zeros((len(pairs), 10), np.int64)
    for q, pair in enumerate(pairs):
        newest_first = pair.anchor[-10:][::-1]
        anchors[q, : len(newest_first)] = newest_first
    known = [sorted(set(pair.anchor) - {pair.row.item}) for pair in pairs]
    return health.Questions(
        anchors_QL=anchors,
        target_Q=np.array([pair.row.item for pair in pairs], np.int64),
        known_start_Q=np.concatenate([[0], np.cumsum([len(items) for items in known])]).astype(np.int64),
        known=np.array([item for items in known for item in items], np.int64),
    )
