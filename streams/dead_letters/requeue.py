"""Sending the record of a dead letter again, under its own key, with its own bytes, unless something newer was said.

`items` is compacted: its last record of a key is the truth about an item. So a record is sent again only if none of its
key came after it. Kafka cannot compare and append in one step, hence three: look, send, look again at what came in
between. What did come in between is newer than what was sent, and is put back on top of it. Who dies between the last
two steps leaves an older record on top of a newer one; asking again finds both and puts the newer one back then.

`behaviours` keeps every record, and an `event_id` counts once, so sending twice is harmless there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka_errors
from pydantic import ValidationError

from schemas.items import ImageRetry
from schemas.letters import Headers, RequeueHeaders
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.log_reader import LogReader
from streams.dead_letters.inbox import DeadLetterEntry, DeadLetterTopic

log = structlog.get_logger()

What = Literal["send", "already", "superseded", "put_back"]
Became = Literal["requeued", "dropped", "already_requeued", "already_dropped", "superseded", "refused"]


@dataclass(frozen=True, slots=True)
class RequeueResult:
    """What became of asking for one letter."""

    id: str
    became: Became
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A record of the letter's key that came after the letter's own."""

    offset: int
    sent_again_from: bytes | None


@dataclass(frozen=True, slots=True)
class RequeueDecision:
    """What to do about a letter, and the record that decides it."""

    what: What
    offset: int | None = None


def judge(letter_key: bytes, since: Iterable[Said]) -> RequeueDecision:
    """Decide from all that was said of a key since the record failed."""
    theirs = max((said.offset for said in since if said.sent_again_from != letter_key), default=None)
    ours = max((said.offset for said in since if said.sent_again_from == letter_key), default=None)
    if ours is None:
        return RequeueDecision("send") if theirs is None else RequeueDecision("superseded", theirs)
    if theirs is not None and theirs < ours:
        return RequeueDecision("put_back", theirs)
    return RequeueDecision("already", ours)


class Since:
    """What was said of a few keys in one partition, as far as it was read."""

    def __init__(self, reader: LogReader, partition: TopicPartition, keys: Iterable[bytes | None], start: int) -> None:
        self.partition = partition
        self._reader = reader
        self._said: dict[bytes | None, list[Said]] = {key: [] for key in keys}
        self._seen = start

    async def read_to(self, end: int) -> None:
        """Take in what was said before offset `end`."""
        async for record in self._reader.read(self.partition, self._seen, end):
            if record.key in self._said:
                again = RequeueHeaders.from_headers(record.headers)
                self._said[record.key].append(Said(record.offset, again.letter_key if again else None))
        self._seen = max(self._seen, end)

    def after(self, key: bytes | None, offset: int) -> list[Said]:
        """What was said of a key behind `offset`."""
        return [said for said in self._said[key] if said.offset > offset]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A letter whose item is to be sent again, and the record of `items` that is meant."""

    filed: DeadLetterEntry
    partition: int
    offset: int


class Requeue:
    """Sends records of letters again, and notes it in the letter box."""

    def __init__(
        self, reader: LogReader, producer: AIOKafkaProducer, broker: BrokerConfig, box: DeadLetterTopic
    ) -> None:
        self._reader = reader
        self._producer = producer
        self._broker = broker
        self._box = box

    async def requeue(
        self, letters: Sequence[DeadLetterEntry], on_outcome: Callable[[RequeueResult], None] = lambda outcome: None
    ) -> list[RequeueResult]:
        """Send each again that nothing newer has superseded. Asking twice sends once."""
        outcomes: list[RequeueResult] = []

        async def settle(filed: DeadLetterEntry, outcome: RequeueResult) -> None:
            if outcome.became in ("requeued", "already_requeued") and filed.handled is None:
                await self._box.mark([filed], "requeued")
            log.info("dead_letter.asked_again", id=filed.id, became=outcome.became)
            outcomes.append(outcome)
            on_outcome(outcome)

        items: dict[int, list[_Asked]] = {}
        for filed in letters:
            found = await self._locate(filed)
            if isinstance(found, RequeueResult):
                await settle(filed, found)
            else:
                items.setdefault(found.partition, []).append(found)
        partitions = {one.partition: one for one in await self._reader.partitions("items")} if items else {}
        for number, asked in items.items():
            if number not in partitions:
                for one in asked:
                    await settle(one.filed, RequeueResult(one.filed.id, "refused", f"items has no partition {number}"))
                continue
            keys = {one.filed.newest.key for one in asked}
            since = Since(self._reader, partitions[number], keys, min(one.offset for one in asked))
            await since.read_to(await self._reader.end(partitions[number]))
            for one in sorted(asked, key=lambda one: one.offset):
                await settle(one.filed, await self._with_size(one.filed, self._item(one, since)))
        return outcomes

    async def _locate(self, filed: DeadLetterEntry) -> _Asked | RequeueResult:
        """The record of `items` that is to be sent again; what became of it, where it is none of those."""
        letter = filed.newest
        if filed.handled is not None:
            return RequeueResult(filed.id, "already_requeued" if filed.handled == "requeued" else "already_dropped")
        if letter.topic == "behaviours":
            return await self._with_size(filed, self._behaviour(filed))
        if letter.topic == "items":
            return _Asked(filed, letter.partition, letter.offset)
        if letter.topic == "items-retry":  # a picture that was given up: the item that asked for it is meant
            try:
                whole = await self._box.letter(filed)
                source = ImageRetry.model_validate_json(whole.value or b"").source
            except ValidationError:
                return RequeueResult(filed.id, "refused", "it does not say which item it belongs to")
            return _Asked(filed, source.partition, source.offset)
        return RequeueResult(filed.id, "refused", f"nothing is sent again to {letter.topic}")

    async def _with_size(self, filed: DeadLetterEntry, sending: Awaitable[RequeueResult]) -> RequeueResult:
        try:
            return await sending
        except kafka_errors.MessageSizeTooLargeError:
            return RequeueResult(
                filed.id, "refused", "it does not fit its topic together with the headers of a repetition"
            )

    async def _behaviour(self, filed: DeadLetterEntry) -> RequeueResult:
        letter = await self._box.letter(filed)
        partitions = await self._reader.partitions("behaviours")
        partition = next((one for one in partitions if one.partition == letter.partition), None)
        if partition is None:
            return RequeueResult(filed.id, "refused", f"behaviours has no partition {letter.partition}")
        offset = await self._send(partition, letter.key, letter.value, RequeueHeaders.of(letter).headers())
        return RequeueResult(filed.id, "requeued", f"as {partition.partition}/{offset}")

    async def _item(self, asked: _Asked, since: Since) -> RequeueResult:
        letter, number, name = await self._box.letter(asked.filed), asked.partition, asked.filed.id
        verdict = judge(letter.letter_key, since.after(letter.key, asked.offset))
        if verdict.what == "superseded":
            return RequeueResult(name, "superseded", f"record {number}/{verdict.offset} of the same key is newer")
        if verdict.what == "already":
            return RequeueResult(name, "already_requeued", f"as {number}/{verdict.offset}")
        if verdict.what == "put_back" and verdict.offset is not None:
            await self._put_back(letter.letter_key, asked, since)
            return RequeueResult(
                name, "superseded", f"record {number}/{verdict.offset} of the same key is newer: put back"
            )
        value = letter.value
        if letter.topic != "items":
            record = await self._reader.one(since.partition, asked.offset)
            if record is None or record.key != letter.key:
                return RequeueResult(name, "superseded", f"record {number}/{asked.offset}, which asked for it, is gone")
            value = record.value
        sent = await self._send(since.partition, letter.key, value, RequeueHeaders.of(letter).headers())
        await since.read_to(sent + 1)
        between = judge(letter.letter_key, since.after(letter.key, asked.offset))
        if between.what == "put_back" and between.offset is not None:
            await self._put_back(letter.letter_key, asked, since)
            return RequeueResult(name, "superseded", f"record {number}/{between.offset} came meanwhile: put back")
        return RequeueResult(name, "requeued", f"as {number}/{sent}")

    async def _put_back(self, letter_key: bytes, asked: _Asked, since: Since) -> None:
        """Have the newest record of the key that is not ours, or a copy of it, be the last one of the key."""
        key = asked.filed.newest.key
        copies: set[int] = set()
        copied: int | None = None
        while True:
            await since.read_to(await self._reader.end(since.partition))
            said = since.after(key, asked.offset)
            newest = max(one.offset for one in said if one.sent_again_from != letter_key and one.offset not in copies)
            if newest in (copied, max(one.offset for one in said)):
                return
            record = await self._reader.one(since.partition, newest)
            if record is None:  # compacted: so something newer is there
                return
            copies.add(await self._send(since.partition, key, record.value, list(record.headers)))
            copied = newest
            log.warning("dead_letter.newer_put_back", partition=since.partition.partition, newer=newest)

    async def _send(self, partition: TopicPartition, key: bytes | None, value: bytes | None, headers: Headers) -> int:
        with broker_errors(self._broker):
            done = await self._producer.send_and_wait(
                partition.topic, key=key, value=value, partition=partition.partition, headers=headers
            )
        return int(done.offset)
