"""The exact training rows of a stretch of training, from the click log and the journal of what was decided.

The log is read again, in batches of any size, and joined as it was then; the journal says which of its impressions made
which step, against which negatives and with which vectors. Its hashes say whether all of it is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from schemas.behaviours import Behaviour, BehaviourKind
from trainer.provenance.journal import NO_FEATURES, Leaf, Segment, StepRows, VectorUse, row_text
from trainer.samples.catalogue import Catalogue, vector_digest
from trainer.samples.exposure_draws import DrawnBefore
from trainer.samples.join_rules import JoinRules
from trainer.samples.rows import Impression, learned_as

Place = tuple[int, int, int]
"""Partition, offset, and the running number of an exposure that was drawn there (0 for one of the log)."""


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One row as it was trained."""

    step: int
    place: Place
    event_id: str
    user_id: str
    item: str
    second: int
    label: int
    correction: bool
    """Whether a late take brought this row once more, as taken."""
    history: tuple[str, ...]
    history_seconds: tuple[int, ...]
    features: tuple[float, ...]
    """Numeric inputs; an earlier build kept none."""
    negatives: list[str] | None
    """Negatives of the row's step; None for a row that is no take, or a step without."""
    taken_as: BehaviourKind | None = None
    """The most reliable kind of take of it that was known."""
    learned: str = ""
    """What the row's hash says of its take."""


@dataclass(frozen=True)
class RebuildResult:
    """Whether what was rebuilt is what was trained."""

    rows: int
    """Rows that were trained."""
    rebuilt: int
    erased: int
    """Rows of users who were forgotten since."""
    users: int
    """Users whose rows were compared."""
    problems: tuple[str, ...] = field(default=())
    """What is missing or differs; empty if all is as it was."""

    @property
    def verified(self) -> bool:
        """Whether every row that may still be shown is the one that was trained."""
        return not self.problems


class Rebuild:
    """Feed it with `observe` and `erased`, in the order of each partition, until `complete` or the log's end.

    Memory: what the window and the join hold, with `most_items` items beside, and the segment's own rows.
    """

    def __init__(self, segment: Segment, rules: JoinRules, *, most_items: int = 1_000_000) -> None:
        self._segment = segment
        self._numbers = Catalogue(1, most_items=most_items)
        self._window, self._join = rules.window(), rules.join(self._numbers, drawn_before=DrawnBefore(segment.drawn))
        self._wanted: set[Place] = {tuple(place) for step in segment.steps for place in step.places.tolist()}
        self._drawn = max((draw for _, _, draw in self._wanted), default=0)
        self._found: dict[Place, Impression] = {}
        self._erased: dict[Place, str] = {}

    def observe(self, partition: int, offset: int, behaviour: Behaviour, *, written_at: float | None = None) -> None:
        """Add an event of the click log; `written_at` is as in `EventWindow.observe`."""
        self._window.observe(partition, offset, behaviour, written_at=written_at)

    def erased(self, partition: int, offset: int, user_id: str) -> None:
        """Count the row of an event whose user was forgotten, and use nothing else of it."""
        for draw in range(self._drawn + 1):
            if (partition, offset, draw) in self._wanted:
                self._erased[partition, offset, draw] = user_id

    def advance(self, *, everything: bool = False) -> None:
        """Join what event time allows."""
        for events in self._window.released(everything=everything):
            self._settle(events[0].second)
            self._join.add_second(events, self._window.ahead)
            for row in self._join.corrections():
                self._find(row)
            self._forget_items()
        self._settle(float("inf") if everything else self._window.complete_before)

    @property
    def complete(self) -> bool:
        """Whether every row is there, or known to be erased."""
        return len(self._found) + len(self._erased) == len(self._wanted)

    def rows(self) -> Iterator[TrainingRow]:
        """The rows that may be shown, in training order."""
        for number, step in enumerate(self._segment.steps):
            for row, features_F in self._impressions(step):
                yield TrainingRow(
                    step=self._segment.first_step + number + 1,
                    place=(row.partition, row.offset, row.draw),
                    event_id=row.event_id,
                    user_id=row.user_id,
                    item=self._numbers.item_id(row.item),
                    second=row.second,
                    label=row.label,
                    correction=row.correction,
                    history=tuple(self._numbers.item_id(item) for item in row.history),
                    history_seconds=row.history_seconds,
                    features=tuple(features_F.tolist()),
                    negatives=step.negatives if row.label else None,
                    taken_as=row.taken_as,
                    learned=learned_as(row, kinds=self._segment.kinds),
                )

    def verify(self, root: str) -> RebuildResult:
        """Compare with the leaves that the journal kept, and these with the `root` that the release states."""
        problems = []
        if self._segment.root != root:
            problems.append("the journal's own hash differs from the release's: one of them was changed")
        missing = len(self._wanted) - len(self._found) - len(self._erased)
        if missing:
            problems.append(f"{missing} rows are not in the log any more, or not where they were")
        leaves: dict[str, Leaf] = {}
        for row in self.rows():
            features_F = np.array(row.features, np.float32)
            text = row_text(row.event_id, row.item, row.learned, row.history, row.history_seconds, features_F)
            leaves.setdefault(row.user_id, Leaf()).add(text)
        gone = Counter(self._erased.values())
        kept = Counter((leaf.digest, leaf.rows) for leaf in self._segment.leaves)
        differing = 0
        for user, leaf in leaves.items():
            if kept[leaf.digest, leaf.rows]:
                kept[leaf.digest, leaf.rows] -= 1
            elif user in gone:
                gone[user] += leaf.rows  # came back under the same id: the chain lacks its beginning
            else:
                differing += 1
        if differing:
            problems.append(f"the rows of {differing} users are not those that were trained")
        left = sum(rows * count for (_, rows), count in kept.items())
        if not problems and left != sum(gone.values()):
            problems.append(f"{left} trained rows belong to no user, but {sum(gone.values())} rows were erased")
        return RebuildResult(
            rows=len(self._wanted),
            rebuilt=len(self._found),
            erased=len(self._erased),
            users=len(leaves),
            problems=tuple(problems),
        )

    def _impressions(self, step: StepRows) -> Iterator[tuple[Impression, NDArray[np.float32]]]:
        for number, place in enumerate(step.places.tolist()):
            row = self._found.get(tuple(place))
            if row is not None:
                yield row, NO_FEATURES if step.features is None else step.features[number]

    def _settle(self, before: float) -> None:
        for row in self._join.resolved(before):
            self._find(row)

    def _forget_items(self) -> None:
        if self._numbers.crowded:
            found = ((row.item, *row.history) for row in self._found.values())
            self._numbers.retire(chain(self._join.items_in_use(), chain.from_iterable(found)))
            self._numbers.release(())

    def _find(self, row: Impression) -> None:
        if (place := (row.partition, row.offset, row.draw)) in self._wanted:
            self._found[place] = replace(row)  # as it was resolved, whatever a late take says


def damaged_vectors(uses: Collection[VectorUse], vectors: Mapping[bytes, NDArray[np.float32]]) -> list[str]:
    """Items of which a vector that was learned from is not archived, or is another one."""
    bad = set()
    for use in uses:
        vector = vectors.get(use.digest)
        if use.digest and (vector is None or vector_digest(use.content, vector) != use.digest):
            bad.add(use.item)
    return sorted(bad)
