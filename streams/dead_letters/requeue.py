"""Requeueing: sends the record of a dead letter again, with its key and bytes, unless a newer record of it exists.

`items` is compacted: the last record of a key is the state of an item. So a record is sent again only if no other of
its key came after it. Kafka cannot compare and append in one step, hence three: read, send, read what came in between.
A record that came in between is newer than the one sent, and is put back behind it. A process that dies between
the last two steps leaves an older record behind a newer one; requeueing again finds both and puts the newer one back.
Where producers hash keys differently, a record of the key in another partition with a later timestamp is newer too: the
one sent again would get the time of now, and win over it.

`behaviours` keeps every record, and an `event_id` counts once, so sending twice is harmless there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from pydantic import ValidationError

from schemas.items import ImageRetry
from schemas.letters import DeadLetter, ForeignHeaders, RequeueHeaders, kept_headers
from streams.broker.clients import BrokerConfig, RecordTooLarge, broker_errors
from streams.broker.log_reader import LogReader
from streams.dead_letters.inbox import DeadLetterEntry, DeadLetterTopic

log = structlog.get_logger()

RequeueAction = Literal["send", "already", "superseded", "put_back"]
RequeueStatus = Literal["requeued", "dropped", "already_requeued", "already_dropped", "superseded", "refused"]

_NO_BYTES = "the letter has no bytes, as the record was too large for it or empty: publish it anew"


@dataclass(frozen=True, slots=True)
class RequeueResult:
    """The result for one letter."""

    id: str
    status: RequeueStatus
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LaterRecord:
    """A record of the letter's key that came after the letter's own."""

    offset: int
    requeued_from: bytes | None


@dataclass(frozen=True, slots=True)
class RequeueDecision:
    """What to do about a letter, and the offset of the record that decides it."""

    action: RequeueAction
    offset: int | None = None


def decide(letter_key: bytes, later: Iterable[LaterRecord]) -> RequeueDecision:
    """Decide from all records of the key that came after the one that failed."""
    later = list(later)
    others = max((record.offset for record in later if record.requeued_from != letter_key), default=None)
    own = max((record.offset for record in later if record.requeued_from == letter_key), default=None)
    if own is None:
        return RequeueDecision("send") if others is None else RequeueDecision("superseded", others)
    if others is not None and others < own:
        return RequeueDecision("put_back", others)
    return RequeueDecision("already", own)


def _again(letter: DeadLetter, own: ForeignHeaders) -> ForeignHeaders:
    """Headers of the record of a letter that is sent again, behind those that it has by itself."""
    return [*own, *RequeueHeaders.of(letter).headers()]


class LaterRecords:
    """Records of a few keys in one partition, as far as it was read."""

    def __init__(self, reader: LogReader, partition: TopicPartition, keys: Iterable[bytes | None], start: int) -> None:
        self.partition = partition
        self._reader = reader
        self._records: dict[bytes | None, list[LaterRecord]] = {key: [] for key in keys}
        self._next = start

    async def read_to(self, end: int) -> None:
        """Read on to before offset `end`."""
        async for record in self._reader.read(self.partition, self._next, end):
            if record.key in self._records:
                again = RequeueHeaders.from_headers(record.headers)
                self._records[record.key].append(LaterRecord(record.offset, again.letter_key if again else None))
        self._next = max(self._next, end)

    def after(self, key: bytes | None, offset: int) -> list[LaterRecord]:
        """The records of a key behind `offset`."""
        return [record for record in self._records[key] if record.offset > offset]


@dataclass(frozen=True, slots=True)
class _FailedItem:
    """A letter whose item is to be sent again, and where its record of `items` is."""

    entry: DeadLetterEntry
    partition: int
    offset: int


class Requeue:
    """Sends records of letters again, and marks the letters as requeued."""

    def __init__(
        self, reader: LogReader, producer: AIOKafkaProducer, broker: BrokerConfig, dead_letters: DeadLetterTopic
    ) -> None:
        self._reader = reader
        self._producer = producer
        self._broker = broker
        self._dead_letters = dead_letters

    async def requeue(
        self, entries: Sequence[DeadLetterEntry], on_result: Callable[[RequeueResult], None] = lambda result: None
    ) -> list[RequeueResult]:
        """Send each record again that no newer one supersedes. Requeueing twice sends once."""
        results: list[RequeueResult] = []

        async def finish(entry: DeadLetterEntry, result: RequeueResult) -> None:
            if result.status in ("requeued", "already_requeued") and entry.handled is None:
                await self._dead_letters.mark([entry], "requeued")
            log.info("dead_letter.asked_again", id=entry.id, became=result.status)
            results.append(result)
            on_result(result)

        by_partition: dict[int, list[_FailedItem]] = {}
        for entry in entries:
            found = await self._locate(entry)
            if isinstance(found, RequeueResult):
                await finish(entry, found)
            else:
                by_partition.setdefault(found.partition, []).append(found)
        partitions = {one.partition: one for one in await self._reader.partitions("items")} if by_partition else {}
        for number, failed in by_partition.items():
            if number not in partitions:
                for one in failed:
                    await finish(one.entry, RequeueResult(one.entry.id, "refused", f"items has no partition {number}"))
                continue
            keys = {one.entry.newest.key for one in failed}
            elsewhere = await self._read_elsewhere(failed, list(partitions.values()))
            later = LaterRecords(self._reader, partitions[number], keys, min(one.offset for one in failed))
            await later.read_to(await self._reader.end(partitions[number]))
            for one in sorted(failed, key=lambda one: one.offset):
                if (place := elsewhere.get((one.entry.newest.key, one.offset))) is not None:
                    detail = f"record {place} of the same key is newer, in another partition"
                    await finish(one.entry, RequeueResult(one.entry.id, "superseded", detail))
                    continue
                await finish(one.entry, await self._refusing_large(one.entry, self._item(one, later)))
        return results

    async def _locate(self, entry: DeadLetterEntry) -> _FailedItem | RequeueResult:
        """The record of `items` to be sent again, or the result where there is none."""
        letter = entry.newest
        if entry.handled is not None:
            return RequeueResult(entry.id, "already_requeued" if entry.handled == "requeued" else "already_dropped")
        if letter.topic == "behaviours":
            return await self._refusing_large(entry, self._behaviour(entry))
        if letter.topic == "items":
            return _FailedItem(entry, letter.partition, letter.offset)
        if letter.topic == "items-retry":  # a picture that was given up: the item that refers to it is sent again
            try:
                whole = await self._dead_letters.letter(entry)
                source = ImageRetry.model_validate_json(whole.value or b"").source
            except ValidationError:
                return RequeueResult(entry.id, "refused", "it does not say which item it belongs to")
            return _FailedItem(entry, source.partition, source.offset)
        return RequeueResult(entry.id, "refused", f"nothing is sent again to {letter.topic}")

    async def _read_elsewhere(
        self, failed: Sequence[_FailedItem], partitions: Sequence[TopicPartition]
    ) -> dict[tuple[bytes | None, int], str]:
        """Where the key of a failed record has a newer one in another partition than its own, by key and offset."""
        times: dict[tuple[bytes | None, int], int] = {}
        own = next(one for one in partitions if one.partition == failed[0].partition)
        others = [one for one in partitions if one != own]
        for one in failed:
            record = await self._reader.one(own, one.offset)
            if record is not None and record.key == one.entry.newest.key:  # else it was compacted away by a newer one
                times[record.key, one.offset] = record.timestamp
        if not times or not others:
            return {}
        newest: dict[bytes | None, tuple[int, int, int]] = {key: (-1, -1, -1) for key, _ in times}
        since = datetime.fromtimestamp(max(0, min(times.values())) / 1000, UTC)
        for partition, first in (await self._reader.first_since(others, since)).items():
            if first is None:
                continue
            async for record in self._reader.read(partition, first, await self._reader.end(partition)):
                if record.key in newest:
                    place = (record.timestamp, record.partition, record.offset)
                    newest[record.key] = max(newest[record.key], place)
        return {
            (key, offset): f"{newest[key][1]}/{newest[key][2]}"
            for (key, offset), time_ms in times.items()
            if newest[key][:2] > (time_ms, own.partition)
        }

    async def _refusing_large(self, entry: DeadLetterEntry, sending: Awaitable[RequeueResult]) -> RequeueResult:
        try:
            return await sending
        except RecordTooLarge:
            return RequeueResult(
                entry.id, "refused", "it does not fit its topic together with the headers of a repetition"
            )

    async def _behaviour(self, entry: DeadLetterEntry) -> RequeueResult:
        letter = await self._dead_letters.letter(entry)
        partitions = await self._reader.partitions("behaviours")
        partition = next((one for one in partitions if one.partition == letter.partition), None)
        if partition is None:
            return RequeueResult(entry.id, "refused", f"behaviours has no partition {letter.partition}")
        if letter.value == b"":
            return RequeueResult(entry.id, "refused", _NO_BYTES)
        offset = await self._send(partition, letter.key, letter.value, _again(letter, letter.record_headers))
        return RequeueResult(entry.id, "requeued", f"as {partition.partition}/{offset}")

    async def _item(self, failed: _FailedItem, later: LaterRecords) -> RequeueResult:
        letter, number, name = await self._dead_letters.letter(failed.entry), failed.partition, failed.entry.id
        decision = decide(letter.letter_key, later.after(letter.key, failed.offset))
        if decision.action == "superseded":
            return RequeueResult(name, "superseded", f"record {number}/{decision.offset} of the same key is newer")
        if decision.action == "already":
            return RequeueResult(name, "already_requeued", f"as {number}/{decision.offset}")
        if decision.action == "put_back":
            await self._put_back(letter.letter_key, failed, later)
            return RequeueResult(
                name, "superseded", f"record {number}/{decision.offset} of the same key is newer: put back"
            )
        value, own = letter.value, letter.record_headers
        if letter.topic != "items":
            record = await self._reader.one(later.partition, failed.offset)
            if record is None or record.key != letter.key:
                return RequeueResult(
                    name, "superseded", f"record {number}/{failed.offset}, which asked for it, is gone"
                )
            value, own = record.value, kept_headers(record.headers)
        if value == b"":
            return RequeueResult(name, "refused", _NO_BYTES)
        sent = await self._send(later.partition, letter.key, value, _again(letter, own))
        await later.read_to(sent + 1)
        between = decide(letter.letter_key, later.after(letter.key, failed.offset))
        if between.action == "put_back":
            await self._put_back(letter.letter_key, failed, later)
            return RequeueResult(name, "superseded", f"record {number}/{between.offset} came meanwhile: put back")
        return RequeueResult(name, "requeued", f"as {number}/{sent}")

    async def _put_back(self, letter_key: bytes, failed: _FailedItem, later: LaterRecords) -> None:
        """Make the newest record of the key that is not ours, or a copy of it, the last one of the key."""
        key = failed.entry.newest.key
        copies: set[int] = set()
        copied: int | None = None
        while True:
            await later.read_to(await self._reader.end(later.partition))
            records = later.after(key, failed.offset)
            newest = max(one.offset for one in records if one.requeued_from != letter_key and one.offset not in copies)
            if newest in (copied, max(one.offset for one in records)):
                return
            record = await self._reader.one(later.partition, newest)
            if record is None:  # compacted away, so a newer one exists
                return
            copies.add(await self._send(later.partition, key, record.value, record.headers))
            copied = newest
            log.warning("dead_letter.newer_put_back", partition=later.partition.partition, newer=newest)

    async def _send(
        self, partition: TopicPartition, key: bytes | None, value: bytes | None, headers: ForeignHeaders
    ) -> int:
        with broker_errors(self._broker):
            done = await self._producer.send_and_wait(
                partition.topic, key=key, value=value, partition=partition.partition, headers=list(headers)
            )
        return int(done.offset)
