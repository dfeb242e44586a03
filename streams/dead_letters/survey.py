"""What lies in `dead-letters`, in bounded memory: how many of which kind, since when, and the newest few.

About 500 bytes are kept of each record that failed, whatever the size of its letters.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from schemas.letters import Action, DeadLetter, ForeignHeaders, Handled
from streams.dead_letters.inbox import DeadLetterEntry, Filter

Kind = tuple[str, str, str]
"""Topic, stage and reason."""


@dataclass(slots=True)
class KindSummary:
    """The records that failed in one way."""

    open: int = 0
    """Those that were not handled yet."""
    handled: int = 0
    first_failed_at: datetime | None = None
    last_failed_at: datetime | None = None

    def add(self, first: datetime, last: datetime, *, is_open: bool) -> None:
        """Count one more record."""
        self.open += is_open
        self.handled += not is_open
        self.first_failed_at = min(first, self.first_failed_at or first)
        self.last_failed_at = max(last, self.last_failed_at or last)


@dataclass(slots=True)
class _Failed:
    """One record that failed."""

    kind: Kind
    is_wanted: bool
    first_failed_at: datetime
    failed_at: datetime
    attempts: int
    letters: int
    at: tuple[int, int]


class Survey:
    """Reads letters one after another. Partitions may come in any order, and interleaved."""

    def __init__(self, wanted: Filter, *, with_handled: bool) -> None:
        self._wanted = wanted
        self._with_handled = with_handled
        self._failed: dict[bytes, _Failed] = {}
        self._handled: dict[bytes, Action] = {}
        self._kinds: dict[Kind, Kind] = {}
        self.unreadable = 0
        """Records that are neither letters nor say that one was handled."""

    def add(self, *, key: bytes | None, value: bytes | None, headers: ForeignHeaders, at: tuple[int, int]) -> None:
        """Add one record; `at` is its partition and offset."""
        try:
            handled = Handled.from_record(key, headers)
            if handled is not None:
                self._handled[_short(handled.letter_key, handled.digest)] = handled.action
                return
            letter = DeadLetter.from_record(value, headers)
        except (KeyError, ValueError):
            self.unreadable += 1
            return
        name = _short(letter.letter_key, letter.digest)
        kind: Kind = (letter.topic, letter.stage, letter.reason.value)
        first, before = letter.first_failed_at or letter.failed_at, self._failed.get(name)
        self._failed[name] = _Failed(
            self._kinds.setdefault(kind, kind),
            self._wanted.admits(letter),
            min(first, before.first_failed_at) if before else first,
            letter.failed_at,
            max(letter.attempts, before.attempts) if before else letter.attempts,
            1 + (before.letters if before else 0),
            at,
        )

    def kinds(self) -> dict[Kind, KindSummary]:
        """The records that are selected, by kind."""
        found: dict[Kind, KindSummary] = {}
        for name, one in self._failed.items():
            if one.is_wanted:
                summary = found.setdefault(one.kind, KindSummary())
                summary.add(one.first_failed_at, one.failed_at, is_open=name not in self._handled)
        return dict(sorted(found.items()))

    def count(self) -> int:
        """How many records are to be listed."""
        return sum(1 for _ in self._listed())

    def newest(self, most: int) -> list[tuple[int, int]]:
        """Where the newest letters of up to `most` records lie: those that failed last, the oldest of them first."""
        newest = heapq.nlargest(most, self._listed(), key=lambda one: (one.failed_at, one.at))
        return [one.at for one in reversed(newest)]

    def entry(self, letter: DeadLetter) -> DeadLetterEntry:
        """The entry of a record by its newest letter, which was read again."""
        name = _short(letter.letter_key, letter.digest)
        one = self._failed[name]
        return DeadLetterEntry.of(
            letter,
            first_failed_at=one.first_failed_at,
            attempts=one.attempts,
            letters=one.letters,
            at=one.at,
            handled=self._handled.get(name),
        )

    def _listed(self) -> Iterable[_Failed]:
        return (
            one
            for name, one in self._failed.items()
            if one.is_wanted and (self._with_handled or name not in self._handled)
        )


def _short(letter_key: bytes, digest: str) -> bytes:
    return hashlib.blake2b(letter_key + b"\n" + digest.encode(), digest_size=16).digest()
