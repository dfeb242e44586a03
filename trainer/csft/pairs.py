"""Behaviour pairs for C-SFT: a query or earlier takes as the anchor, and the next take as the positive."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from schemas.behaviours import BehaviourKind
from trainer.samples.corrections import CorrectableRows
from trainer.samples.label_join import ImpressionJoin
from trainer.samples.numbering import ItemNumbers
from trainer.samples.rows import RELIABILITY, Impression, Take
from trainer.samples.window import Observed

_IMAGE, _TITLE, _FUSED = 0, 1, 2


class AnchorKind(StrEnum):
    """The kind of a pair's anchor."""

    QUERY_IMAGE = "query_image"
    QUERY_TEXT = "query_text"
    TRIGGER_ITEM = "trigger_item"


class NoPair(StrEnum):
    """Why a take makes no pair."""

    TAKEN_BEFORE = "taken_before"
    """The user had taken the item before."""
    ITEM_NOT_LEARNED = "item_not_learned"
    """The item has no content here, or is held out."""
    NO_ANCHOR = "no_anchor"
    """The user had neither searched nor taken anything before."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One positive with its anchor."""

    row: Impression
    """The impression that was taken."""
    anchor_kind: AnchorKind
    anchor: tuple[int, ...]
    """Item numbers of the anchor, newest last; one number for a query."""
    passed_over: tuple[int, ...]
    """Items of the user's latest exposures that were not taken, newest last."""

    @property
    def kind(self) -> BehaviourKind:
        """The kind of the take."""
        return self.row.taken_as or BehaviourKind.CLICK

    @property
    def take(self) -> Take:
        """The positive as an entry of the memory."""
        return Take(self.row.second, self.row.user_id, self.row.item)

    @property
    def view(self) -> int:
        """The view of the anchor that is the query: picture, title or fused."""
        return {AnchorKind.QUERY_IMAGE: _IMAGE, AnchorKind.QUERY_TEXT: _TITLE}.get(self.anchor_kind, _FUSED)


class PairMiner:
    """Turns resolved impressions, in event-time order, into pairs.

    The anchor is the photo or the text of the user's search, where there was one, else the items taken before that
    second (the trigger item last). A positive without history and without a query makes no pair. Exposures that were
    not taken are kept per user as hard negatives, except items that the user took before.

    A later take of the same item makes no second pair. Within `take_seconds` of its kind, in event time, it counts for
    the first one where it is more reliable: a click that became a purchase is a purchase.
    """

    def __init__(
        self,
        numbers: ItemNumbers,
        *,
        queries: Mapping[str | bytes, int] | None = None,
        left_out: NDArray[np.bool_] | None = None,
        passed_over_length: int = 20,
        max_users: int = 1_000_000,
        take_seconds: Mapping[BehaviourKind, float] | None = None,
    ) -> None:
        self.no_pair: Counter[NoPair] = Counter()
        """Takes that made no pair, by reason."""
        self._numbers = numbers
        self._queries = queries or {}
        self._left_out = left_out
        self._length = passed_over_length
        self._max_users = max_users
        self._take_seconds = take_seconds or {}
        self._passed: OrderedDict[str, list[int]] = OrderedDict()
        self._rising: OrderedDict[tuple[str, int], Impression] = OrderedDict()

    def pairs(self, impressions: Iterable[Impression]) -> Iterator[Pair]:
        """Pairs of these impressions, in their order."""
        for row in impressions:
            if not row.label:
                self._remember(row)
                continue
            if row.retaken:
                self._raise_kind(row)
                self.no_pair[NoPair.TAKEN_BEFORE] += 1
                continue
            if not self._usable(row.item):
                self.no_pair[NoPair.ITEM_NOT_LEARNED] += 1
                continue
            kind, anchor = self._anchor(row)
            if not anchor:
                self.no_pair[NoPair.NO_ANCHOR] += 1
                continue
            seen = self._passed.get(row.user_id, ())
            owned = {row.item, *row.history}
            self._watch_kind(row)
            yield Pair(row, kind, anchor, tuple(item for item in seen if item not in owned))

    def _anchor(self, row: Impression) -> tuple[AnchorKind, tuple[int, ...]]:
        for kind, query in ((AnchorKind.QUERY_IMAGE, row.query_image), (AnchorKind.QUERY_TEXT, row.query_text)):
            if query and query in self._queries:
                return kind, (self._queries[query],)
        return AnchorKind.TRIGGER_ITEM, tuple(item for item in row.history if self._usable(item) and item != row.item)

    def _watch_kind(self, row: Impression) -> None:
        oldest = row.second - max(self._take_seconds.values(), default=0.0)
        while self._rising and next(iter(self._rising.values())).second < oldest:
            self._rising.popitem(last=False)
        self._rising[row.user_id, row.item] = row

    def _raise_kind(self, row: Impression) -> None:
        first, kind = self._rising.get((row.user_id, row.item)), row.taken_as
        if first is None or kind is None or row.second - first.second > self._take_seconds.get(kind, 0.0):
            return
        if first.taken_as is None or RELIABILITY[kind] > RELIABILITY[first.taken_as]:
            first.taken_as = kind

    def _usable(self, item: int) -> bool:
        return self._numbers.has_vector(item) and not (self._left_out is not None and self._left_out[item])

    def _remember(self, row: Impression) -> None:
        if not self._usable(row.item):
            return
        passed = self._passed.setdefault(row.user_id, [])
        self._passed.move_to_end(row.user_id)
        passed.append(row.item)
        del passed[: -self._length]
        if len(self._passed) > self._max_users:
            self._passed.popitem(last=False)


class HardNegatives:
    """One negative for a pair: an item shown to its user and not taken, else an item of the same category."""

    def __init__(self, category: NDArray[np.int64], *, usable: NDArray[np.bool_], exposed_first: bool = True) -> None:
        order = np.flatnonzero(usable & (category >= 0))
        order = order[np.argsort(category[order], kind="stable")]
        self._order = order
        self._start = np.searchsorted(category[order], category, side="left")
        self._stop = np.searchsorted(category[order], category, side="right")
        self._exposed_first = exposed_first

    def choose(self, pair: Pair, rng: np.random.Generator) -> int:
        """Number of an item that is neither the positive nor another take of the user; 0 if there is none."""
        if self._exposed_first and pair.passed_over:
            return pair.passed_over[int(rng.integers(len(pair.passed_over)))]
        item = pair.row.item
        start, stop = int(self._start[item]), int(self._stop[item])
        if stop - start < 2:
            return 0
        owned = {item, *pair.row.history}
        for _ in range(4):
            chosen = int(self._order[int(rng.integers(start, stop))])
            if chosen not in owned:
                return chosen
        return 0


def join_all(
    seconds: Iterable[list[Observed]],
    numbers: ItemNumbers,
    *,
    history_length: int,
    attribution_seconds: float,
    corrections: CorrectableRows | None = None,
) -> Iterator[Impression]:
    """Labelled impressions of a closed range of the log, by the same join as the online trainer's.

    The log is closed: what a late take corrects (`corrections`) is corrected before the first impression is returned,
    and stays where it was shown. With corrections all impressions are in memory.
    """
    join = ImpressionJoin(
        numbers,
        history_length=history_length,
        attribution_seconds=attribution_seconds,
        max_users=1_000_000,
        corrections=corrections,
    )
    if corrections is None:
        for events in seconds:
            yield from join.resolved(before=events[0].second)
            join.add_second(events)
        yield from join.resolved(before=float("inf"))
        return
    rows: list[Impression] = []
    shown: dict[tuple[str, str], Impression] = {}
    for events in seconds:
        for row in join.resolved(before=events[0].second):
            rows.append(row)
            shown[row.user_id, row.event_id] = row
        join.add_second(events)
        for corrected in join.corrections():
            row = shown[corrected.user_id, corrected.shown_as]
            row.label, row.taken_as = corrected.label, corrected.taken_as
    yield from rows
    yield from join.resolved(before=float("inf"))


def batches(
    pairs: Sequence[Pair], *, size: int, rng: np.random.Generator, shuffle_seconds: float
) -> Iterator[list[Pair]]:
    """One pass over the pairs: shuffled inside blocks of event time, in batches of `size`; the last may be short."""
    if not pairs:
        return
    block = np.array([pair.row.second // shuffle_seconds for pair in pairs])
    order = np.lexsort((rng.random(len(pairs)), block))
    for start in range(0, len(order), size):
        yield [pairs[int(i)] for i in order[start : start + size]]
