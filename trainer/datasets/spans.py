"""A data-set folder for C-SFT: spans of event time, pairs for training, questions for evaluation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoders.base import ItemContent, query_content
from schemas.behaviours import Behaviour, BehaviourKind
from trainer.csft.health import Questions
from trainer.csft.pairs import NoPair, Pair, PairMiner, join_all
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import DAY_SECONDS, DataSet, interaction_columns
from trainer.datasets.parquet import as_numbers
from trainer.samples.numbering import FeatureNumbers
from trainer.samples.window import Observed

LEARN_UNTIL, VALIDATE_FROM, TEST_FROM = 0.5, 0.7, 0.8
"""Shares of the events, in order of time, that bound the spans (whole days where only days are known)."""
HISTORY_ITEMS = 10


@dataclass(frozen=True)
class Span:
    """From second `start` up to, not including, second `stop`."""

    start: int
    stop: int

    def holds(self, ts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these seconds are inside."""
        return np.asarray((ts >= self.start) & (ts < self.stop))


@dataclass(frozen=True, eq=False)
class BehaviourLog:
    """The log of a folder with item numbers (position + 1), liked rows and held-out items."""

    data: DataSet
    ts: NDArray[np.int64]
    """Recorded seconds (midnight where only days are known)."""
    user: NDArray[np.int64]
    item: NDArray[np.int64]
    liked: NDArray[np.bool_]
    held_out: NDArray[np.bool_]
    """Per item number: never trained on."""

    @staticmethod
    def of(data: DataSet, folder: Path) -> BehaviourLog:
        """Add the columns that the replay does not need: labels of ratings, and held-out items if the set has any."""
        path = folder / "interactions.parquet"
        liked = as_numbers(interaction_columns(folder, ["label"])[0], path, "label") > 0
        held_out = np.zeros(len(data.item_ids) + 1, bool)
        if "cold_holdout" in data.items.column_names:
            held_out[1:] = as_numbers(data.items, folder / "items.parquet", "cold_holdout") > 0
        rows = data.interactions
        return BehaviourLog(data, rows.ts, rows.user, rows.item + 1, liked, held_out)

    def boundary(self, share: float) -> int:
        """The second at which this share of the events has passed."""
        ordered = np.sort(self.ts)
        second = int(ordered[min(len(ordered) - 1, round(share * len(ordered)))])
        if not self.data.day_resolution:
            return second
        days, first = np.unique(ordered, return_index=True)
        nearest = int(np.argmin(np.abs(first / len(ordered) - share)))
        return int(days[nearest])

    @property
    def learn(self) -> Span:
        """The span that encoders are trained on."""
        return Span(int(self.ts.min()), self.boundary(LEARN_UNTIL))

    @property
    def validation(self) -> Span:
        """The span that settings are chosen on."""
        return Span(self.boundary(VALIDATE_FROM), self.boundary(TEST_FROM))

    @property
    def test(self) -> Span:
        """The span that is evaluated once."""
        return Span(self.boundary(TEST_FROM), int(self.ts.max()) + DAY_SECONDS)

    def cold(self, span: Span) -> NDArray[np.bool_]:
        """Per item number: held out, or not taken before the span; false for padding."""
        cold = np.ones(len(self.held_out), bool)
        cold[self.item[self.ts < span.start]] = False
        cold |= self.held_out
        cold[0] = False
        return cold

    def published(self, span: Span) -> NDArray[np.bool_]:
        """Per item number: published before the end of the span. An encoder of that time has not seen the others."""
        return np.concatenate([[False], self.data.publish_ts < span.stop])

    def recent_takes(self, span: Span) -> NDArray[np.int64]:
        """Takes per item number over the last day before the span, or over its last 5 % of events if that is more."""
        before = self.ts < span.start
        start = min(span.start - DAY_SECONDS, int(np.quantile(self.ts[before], 0.94)))
        counts = np.bincount(self.item[before & (self.ts >= start)], minlength=len(self.held_out))
        counts[self.held_out] = 0
        return counts

    # ---- pairs ---------------------------------------------------------------------------------------------------

    def pairs(
        self,
        span: Span,
        numbers: FeatureNumbers,
        *,
        history_length: int,
        seed: int,
        queries: Mapping[str | bytes, int] | None = None,
        held_out: bool = False,
        no_pair: Counter[NoPair] | None = None,
    ) -> list[Pair]:
        """Pairs of a span, by the online trainer's join over the log that a replay sends.

        `queries` are the numbers of searches as `queries_taken` names them. `held_out` is for pairs that nothing is
        learned from. `no_pair` receives the number of takes that make no pair, by reason.
        """
        miner = PairMiner(numbers, queries=queries, left_out=None if held_out else self.held_out)
        seconds = self._observed(span, seed)
        impressions = join_all(seconds, numbers, history_length=history_length, attribution_seconds=0.0)
        pairs = list(miner.pairs(impressions))
        if no_pair is not None:
            no_pair.update(miner.no_pair)
        return pairs

    def queries_taken(self) -> dict[str | bytes, ItemContent]:
        """What something was taken after searching for: words by themselves, a photo by a name that stands for it."""
        searches, of_rows = self.data.searches, self.data.interactions.search
        if searches is None or of_rows is None:
            return {}
        places = np.unique(of_rows[self.liked & (of_rows >= 0)]).tolist()
        texts = {text: query_content(text, None) for place in places if (text := searches.text(place)) is not None}
        images = {
            photo_name(place): query_content(None, image)
            for place, image in zip(places, searches.images(places), strict=True)
            if image is not None
        }
        return texts | images

    def _observed(self, span: Span, seed: int) -> Iterator[list[Observed]]:
        log = behaviours_of(self.data, seed=seed)
        disliked = log.is_take & ~self.liked[np.maximum(log.row, 0)]
        kept = np.flatnonzero((log.ts >= span.start) & (log.ts < span.stop) & ~disliked)
        ids, users, searches = self.data.item_ids, self.data.user_ids, self.data.searches
        second, events = None, []
        for place in kept:
            ts, take = int(log.ts[place]), bool(log.is_take[place])
            if second is not None and ts != second:
                yield events
                events = []
            second = ts
            name = log.exposure_name(int(place))
            search, trigger = int(log.search[place]), int(log.trigger[place])
            # checked when the set was read; skipping validation is ten times faster
            behaviour = Behaviour.model_construct(
                event_id=f"t{name}" if take else name,
                kind=self.data.interactions.kind_of(int(log.row[place])) if take else BehaviourKind.EXPOSURE,
                user_id=users[log.user[place]],
                item_id=ids[log.item[place]],
                occurred_at=datetime.fromtimestamp(ts, UTC),
                exposure_id=name if take else None,
                query_text=None if search < 0 or searches is None else searches.text(search),
                query_image=None if search < 0 else photo_name(search),
                trigger_item=None if trigger < 0 else ids[trigger],
                defines_publish=False,
            )
            events.append(Observed(0, int(place), ts, behaviour))
        if events:
            yield events

    # ---- questions -----------------------------------------------------------------------------------------------

    def next_questions(self, span: Span) -> Questions:
        """The next liked item, given the earlier ones of the user (of earlier days, where only days are known)."""
        order = np.lexsort((np.arange(len(self.ts)), self.ts))
        order = order[self.ts[order] < span.stop]
        liked: dict[int, list[tuple[int, int]]] = defaultdict(list)
        met: dict[int, set[int]] = defaultdict(set)
        questions: list[tuple[list[int], int, set[int]]] = []
        waiting: list[tuple[int, int, bool]] = []
        now = None
        for row in order:
            ts, user, item = int(self.ts[row]), int(self.user[row]), int(self.item[row])
            if ts != now:
                _flush(waiting, now, liked, met)
                waiting, now = [], ts
            waiting.append((user, item, bool(self.liked[row])))
            if ts >= span.start and self.liked[row] and liked[user] and item not in met[user]:
                questions.append(([item for _, item in liked[user][-HISTORY_ITEMS:]][::-1], item, set(met[user])))
        return Questions.of(questions)

    def basket_questions(self, span: Span) -> Questions | None:
        """Each item of one day's basket, given its neighbour in it; None where times are finer than days."""
        if not self.data.day_resolution:
            return None
        inside = span.holds(self.ts) & self.liked
        baskets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for ts, user, item in zip(self.ts[inside], self.user[inside], self.item[inside], strict=True):
            baskets[int(ts), int(user)].append(int(item))
        found: list[tuple[list[int], int, set[int]]] = []
        for items in baskets.values():
            distinct = list(dict.fromkeys(items))
            if len(distinct) > 1:
                anchors = [distinct[1], *distinct]
                found.extend(([one], other, {one}) for one, other in zip(anchors, distinct, strict=False))
        return Questions.of(found)


def photo_name(place: int) -> bytes:
    """Stands for the photo of a search, so that a log of searches does not hold their pictures."""
    return b"%d" % place


def _flush(
    waiting: list[tuple[int, int, bool]],
    ts: int | None,
    liked: dict[int, list[tuple[int, int]]],
    met: dict[int, set[int]],
) -> None:
    for user, item, good in waiting:
        met[user].add(item)
        if good:
            liked[user].append((ts or 0, item))
