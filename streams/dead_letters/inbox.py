"""Dead letters as a user sees them: one entry per record that failed, open or handled.

All of this is in the topic `dead-letters`. That a letter was handled is a record under the letter's key: in the same
partition behind it, as durable, and deleted with it. It counts for the record that failed, so a record that fails the
same way again because a worker reads it anew stays handled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

import structlog
from aiokafka import AIOKafkaProducer

from schemas.errors import Misconfigured, Reason
from schemas.letters import Action, DeadLetter, ForeignHeaders, Handled
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.log_reader import LogReader

if TYPE_CHECKING:
    from streams.dead_letters.survey import Survey

log = structlog.get_logger()

_PROGRESS_EVERY = 200

OnProgress = Callable[[int, int], None]
"""Called with the number of offsets read, and of all."""


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class DeadLetterEntry:
    """A record that failed, with all letters about it. Its value stays in the topic."""

    id: str
    """`topic/partition/offset` of the record."""
    newest: DeadLetter
    """The newest letter, without its value."""
    value_bytes: int | None
    digest: str
    first_failed_at: datetime
    attempts: int
    letters: int
    """How many letters there are: several if a worker read the record again, or refused two parts of it."""
    at: tuple[int, int]
    """Partition and offset of the newest letter."""
    handled: Action | None = None

    @classmethod
    def of(
        cls,
        letter: DeadLetter,
        *,
        first_failed_at: datetime,
        attempts: int,
        letters: int,
        at: tuple[int, int],
        handled: Action | None = None,
    ) -> DeadLetterEntry:
        """The entry of a record by its newest letter."""
        return cls(
            id=letter.letter_key.decode(),
            newest=replace(letter, value=None),
            value_bytes=None if letter.value is None else len(letter.value),
            digest=letter.digest,
            first_failed_at=first_failed_at,
            attempts=attempts,
            letters=letters,
            at=at,
            handled=handled,
        )


@dataclass(frozen=True, slots=True)
class Filter:
    """Which entries are selected. None selects all."""

    ids: frozenset[str] = frozenset()
    topic: str | None = None
    stage: str | None = None
    reason: Reason | None = None
    since: datetime | None = None
    """Last failure at this moment or later."""
    key: bytes | None = None

    def admits(self, letter: DeadLetter) -> bool:
        """Whether the record is selected whose newest letter this is."""
        return (
            (not self.ids or letter.letter_key.decode() in self.ids)
            and self.topic in (None, letter.topic)
            and self.stage in (None, letter.stage)
            and self.reason in (None, letter.reason)
            and (self.since is None or letter.failed_at >= self.since)
            and self.key in (None, letter.key)
        )


@dataclass
class DeadLetterIndex:
    """Groups records of `dead-letters` into entries. Partitions may come in any order, and interleaved."""

    _entries: dict[tuple[str, str], DeadLetterEntry] = field(default_factory=dict)
    _handled: dict[tuple[str, str], Handled] = field(default_factory=dict)
    unreadable: int = 0
    """Records that are neither letters nor say that one was handled."""

    def add(self, *, key: bytes | None, value: bytes | None, headers: ForeignHeaders, at: tuple[int, int]) -> None:
        """Add one record; `at` is its partition and offset."""
        try:
            handled = Handled.from_record(key, headers)
            letter = None if handled else DeadLetter.from_record(value, headers)
        except (KeyError, ValueError):
            self.unreadable += 1
            return
        if handled is not None:
            self._handled[handled.letter_key.decode(errors="replace"), handled.digest] = handled
        if letter is not None:
            self._add_letter(letter, at)

    def _add_letter(self, letter: DeadLetter, at: tuple[int, int]) -> None:
        name, digest = letter.letter_key.decode(), letter.digest
        before = self._entries.get((name, digest))
        first = letter.first_failed_at or letter.failed_at
        self._entries[name, digest] = DeadLetterEntry.of(
            letter,
            first_failed_at=min(first, before.first_failed_at) if before else first,
            attempts=max(letter.attempts, before.attempts) if before else letter.attempts,
            letters=1 + (before.letters if before else 0),
            at=at,
        )

    def entries(self) -> list[DeadLetterEntry]:
        """All entries, oldest failure first."""
        marked = [
            replace(entry, handled=self._handled[name].action) if name in self._handled else entry
            for name, entry in self._entries.items()
        ]
        return sorted(marked, key=lambda entry: (entry.newest.failed_at, entry.id))


class DeadLetterTopic:
    """The topic `dead-letters`, read and written."""

    def __init__(
        self,
        reader: LogReader,
        producer: AIOKafkaProducer,
        broker: BrokerConfig,
        *,
        now: Callable[[], datetime],
    ) -> None:
        self._reader = reader
        self._producer = producer
        self._broker = broker
        self._now = now

    async def read(self, on_progress: OnProgress = _silent) -> list[DeadLetterEntry]:
        """Read all entries. `on_progress` gets the number of offsets read, and of all."""
        index = DeadLetterIndex()
        await self._read_into(index, on_progress)
        return index.entries()

    async def survey(self, survey: Survey, on_progress: OnProgress = _silent) -> None:
        """Read all letters into a survey."""
        await self._read_into(survey, on_progress)

    async def newest(self, survey: Survey, most: int) -> list[DeadLetterEntry]:
        """The newest entries of a survey, oldest failure first. One whose retention ended meanwhile is left out."""
        partitions = {one.partition: one for one in await self._reader.partitions("dead-letters")}
        found = []
        for partition, offset in survey.newest(most):
            record = await self._reader.one(partitions[partition], offset)
            if record is not None:
                found.append(survey.entry(DeadLetter.from_record(record.value, record.headers)))
        return found

    async def _read_into(self, index: DeadLetterIndex | Survey, on_progress: OnProgress) -> None:
        bounds = await self._reader.bounds(await self._reader.partitions("dead-letters"))
        total = sum(end - start for start, end in bounds.values())
        passed = 0
        for partition, (start, end) in bounds.items():
            async for record in self._reader.read(partition, start, end):
                index.add(
                    key=record.key,
                    value=record.value,
                    headers=record.headers,
                    at=(partition.partition, record.offset),
                )
                if record.offset % _PROGRESS_EVERY == 0:
                    on_progress(passed + record.offset + 1 - start, total)
            passed += end - start
            on_progress(passed, total)
        if index.unreadable:
            log.warning("dead_letters.unreadable", count=index.unreadable)

    async def letter(self, entry: DeadLetterEntry) -> DeadLetter:
        """The newest letter of an entry, with the original bytes."""
        partition = (await self._reader.partitions("dead-letters"))[entry.at[0]]
        record = await self._reader.one(partition, entry.at[1])
        if record is None:
            raise Misconfigured(f"letter {entry.id} is no longer in {partition.topic}: its retention is over")
        return DeadLetter.from_record(record.value, record.headers)

    async def mark(self, entries: Iterable[DeadLetterEntry], action: Action) -> None:
        """Mark entries as handled. The marks are durable when this returns."""
        topic = (await self._reader.partitions("dead-letters"))[0].topic
        with broker_errors(self._broker):
            for entry in entries:
                handled = Handled(entry.id.encode(), entry.digest, action, self._now())
                await self._producer.send_and_wait(
                    topic,
                    key=handled.letter_key,
                    partition=entry.at[0],  # behind its letter, however that partition was chosen
                    headers=handled.headers(),
                )


def only_open(entries: Sequence[DeadLetterEntry]) -> list[DeadLetterEntry]:
    """Those that were not handled yet."""
    return [entry for entry in entries if entry.handled is None]
