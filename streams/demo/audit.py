"""After the stream has run dry: what is in the topics and in the center, counted from outside."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from encoders.base import Encoder, ItemContent, Prepared
from schemas.errors import EncodingFailed, Reason
from schemas.items import parse_embedding_key
from schemas.letters import DeadLetter
from schemas.scoring import MAX_SIMILAR_QUERIES
from streams.broker.clients import BrokerConfig
from streams.broker.log_reader import LogReader
from streams.broker.topics import TopicsConfig
from streams.demo.api import ServeApi
from trainer.datasets.exposures import is_drawn_name
from trainer.datasets.folder import DataSet

_QUERIES_AT_ONCE = MAX_SIMILAR_QUERIES
"""As many as one request may hold: in the embedded store a search costs about the same for one item as for many."""
_FEW, _MANY = 10, 100
"""Neighbours asked for: few first, many for an item that has more identical twins than that."""


async def announced_items(broker: BrokerConfig, topics: TopicsConfig) -> set[str]:
    """Items whose newest announcement on `embeddings` is a vector."""
    held: set[str] = set()
    async with LogReader(broker, topics) as reader:
        async for record in reader.read_topic("embeddings"):
            _, item_id = parse_embedding_key(record.key)
            (held.discard if record.value is None else held.add)(item_id)
    return held


class DrawnExposures:
    """Counts exposures that the replay drew, and those among them that do not say from which take.

    Popularity counts the take that an exposure was drawn from. Where a row does not name it, features cannot leave it
    out, and it tells drawn rows from shown ones.
    """

    def __init__(self) -> None:
        self.drawn = 0
        self.without_source = 0

    def see(self, value: bytes) -> None:
        """Look at a behaviour event as it was sent."""
        event = json.loads(value)
        if event["kind"] == "exposure" and is_drawn_name(event["event_id"]):
            self.drawn += 1
            self.without_source += not event.get("drawn_from") or not event.get("drawn_at")


@dataclass(frozen=True)
class Letters:
    """The dead letters, set against the events that were broken on purpose."""

    items: int
    """Items that were refused."""
    behaviours: int
    by_reason: dict[str, int]
    """`topic reason` -> how many."""
    expected: int
    """Events that were broken on purpose."""
    missing: list[str]
    """Broken events without a letter, or with another reason than theirs."""
    unexpected: list[str]
    """Letters about events that should be good."""
    pictures: int = 0
    """Pictures that were refused of items that are held by their title: no fault of the system."""


async def read_letters(
    broker: BrokerConfig, topics: TopicsConfig, broken: Mapping[tuple[str, int, int], Reason], held: Set[str]
) -> Letters:
    """Read all dead letters and compare each with what was sent, and with the items that the center holds."""
    found: dict[tuple[str, int, int], DeadLetter] = {}
    async with LogReader(broker, topics) as reader:
        async for record in reader.read_topic("dead-letters"):
            letter = DeadLetter.from_record(record.value, record.headers)
            found[(letter.topic, letter.partition, letter.offset)] = letter
    return judge_letters(found, broken, held)


def judge_letters(
    found: Mapping[tuple[str, int, int], DeadLetter], broken: Mapping[tuple[str, int, int], Reason], held: Set[str]
) -> Letters:
    """Compare letters by their source with the events that were broken on purpose and with the items that are held."""
    of_pictures = {
        source
        for source, letter in found.items()
        if source not in broken and letter.stage == "image" and (letter.key or b"").decode(errors="replace") in held
    }
    missing = []
    for source, reason in broken.items():
        came = found.get(source)
        if came is None:
            missing.append(f"{_words(source)}: {reason} was expected, no letter came")
        elif came.reason != reason:
            missing.append(f"{_words(source)}: {reason} was expected, {came.reason} came ({came.detail})")
    unexpected = [
        f"{_words(source)}: {letter.reason}, {letter.detail}"
        for source, letter in found.items()
        if source not in broken and source not in of_pictures
    ]
    kinds = Counter(f"{letter.topic} {letter.reason.value}" for letter in found.values())
    return Letters(
        items=sum(letter.topic == "items" and source not in of_pictures for source, letter in found.items()),
        behaviours=sum(letter.topic == "behaviours" for letter in found.values()),
        by_reason=dict(sorted(kinds.items())),
        expected=len(broken),
        missing=missing,
        unexpected=unexpected,
        pictures=len(of_pictures),
    )


async def searchable(api: ServeApi, item_ids: Sequence[str]) -> set[str]:
    """Items that are found among the neighbours of themselves."""
    found = await _found_among(api, item_ids, _FEW)
    return found | await _found_among(api, [item for item in item_ids if item not in found], _MANY)


async def _found_among(api: ServeApi, item_ids: Sequence[str], k: int) -> set[str]:
    found: set[str] = set()
    for start in range(0, len(item_ids), _QUERIES_AT_ONCE):
        asked = item_ids[start : start + _QUERIES_AT_ONCE]
        for item_id, result in zip(asked, await api.similar(asked, k=k, include_self=True), strict=True):
            if any(neighbour.item_id == item_id for neighbour in result.neighbours):
                found.add(item_id)
    return found


async def compare_with_fresh(
    api: ServeApi, encoder: Encoder, data: DataSet, positions: Sequence[int], *, outcomes: Container[str] = ()
) -> float:
    """The smallest cosine between what the center holds and a fresh encode of these items; -1 if one is absent.

    Attributes that are `outcomes` are not encoded.
    """
    records = [data.records(position, position + 1)[0] for position in positions]
    pictures = await asyncio.to_thread(data.pictures.of, records)
    contents = [one.content(picture, outcomes) for one, picture in zip(records, pictures, strict=True)]
    prepared = [prepare_as_indexed(encoder, content) for content in contents]
    fresh = await asyncio.to_thread(encoder.encode, prepared)
    smallest = 1.0
    for record, vector in zip(records, fresh, strict=True):
        view = await api.item(record.item_id)
        if view is None or view.vector is None:
            return -1.0
        smallest = min(smallest, float(np.dot(vector, np.asarray(view.vector, dtype=np.float32))))
    return smallest


def prepare_as_indexed(encoder: Encoder, content: ItemContent) -> Prepared:
    """What the towers see of an item: without its picture, if that cannot be used."""
    try:
        return encoder.prepare(content)
    except EncodingFailed:
        return encoder.prepare(replace(content, image=None))


def _words(source: tuple[str, int, int]) -> str:
    topic, partition, offset = source
    return f"{topic}/{partition}/{offset}"
