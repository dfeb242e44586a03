"""Recounts from the log alone what each row may know of the takes of its item, and refuses a run that knew more.

A row may know the takes before the newest second of the step before its own, and not the one that it was drawn from.
The audit shares no code with the features: it keeps the seconds of all takes by item.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from trainer.datasets.exposures import is_drawn_name
from trainer.networks.ciubm import CtrBatch
from trainer.samples.catalogue import Catalogue
from trainer.samples.partition_merge import Entry
from trainer.samples.rows import Impression

_ROUNDING = 2e-3
"""Share of a count that the features round away, twice."""
_LATER = "takes of their own second or a later one"
_SOURCE = "the take that they were drawn from, or takes since the step before"
_STEP = "takes since the step before"


class LeakAudit:
    """`hear` the log while it is read, and `observe` each batch; what it `found` is a list of messages."""

    def __init__(self, names: Sequence[str], *, drawn_here: bool) -> None:
        """`names` are those of the features. `drawn_here`: the replay drew exposures, so it knows from which takes."""
        self.catalogue: Catalogue | None = None
        self._place = names.index("takes")
        self._drawn_here = drawn_here
        self._seconds: dict[str, list[int]] = defaultdict(list)
        self._counted: dict[str, int] = {}
        self._source: dict[str, str] = {}
        self._ids: set[str] = set()
        self._newest = -math.inf
        self._counts: Counter[str] = Counter()

    def hear(self, events: Iterable[Entry]) -> Iterator[Entry]:
        """The same events."""
        for entry in events:
            event = entry.behaviour
            if event is not None and event.event_id not in self._ids:
                self._ids.add(event.event_id)
                if event.kind.is_take and not event.defines_publish:
                    second = self._counted[event.event_id] = math.floor(event.occurred_at.timestamp())
                    insort(self._seconds[event.item_id], second)
                if event.drawn_from is not None:
                    self._source[event.event_id] = event.drawn_from
                elif self._drawn_here and is_drawn_name(event.event_id):
                    self._counts["exposures were drawn and do not name the take that they were drawn from"] += 1
            yield entry

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        """Compare the rows of a step."""
        assert self.catalogue is not None, "whose items these are is not known"
        for row, takes in zip(rows, batch.dense_BF[:, self._place].tolist(), strict=True):
            if row.correction:
                continue  # it has the features of its impression
            seconds = self._seconds.get(self.catalogue.item_id(row.item), [])
            before = bisect_left(seconds, self._newest)
            source = self._counted.get(self._source.get(row.event_id, ""), math.inf) < self._newest
            known = math.expm1(takes)
            if known > before - source + 0.5 + _ROUNDING * before:
                later = known > bisect_left(seconds, row.second) + 0.5
                self._counts[f"rows know {_LATER if later else _SOURCE if source else _STEP}"] += 1
        self._newest = max([self._newest, *(row.second for row in rows)])

    @property
    def found(self) -> list[str]:
        """One message per way in which rows know too much."""
        return [f"{count} {what}" for what, count in self._counts.items()]
