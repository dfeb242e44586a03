"""The invariants, looked at from outside after a round; a finding is a sentence that says what is wrong with what."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow as pa
from aiokafka.errors import KafkaError

from encoders.base import Encoder, ItemContent, query_content
from schemas.errors import Unavailable
from schemas.items import ItemEmbedding, ItemPublished, parse_embedding_key
from schemas.letters import DeadLetter
from schemas.queries import QueryEmbedding, query_id
from streams.stores.artifacts.registry import folder_registry
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.vectors.milvus_index import MilvusItemIndex
from streams.training.scores import SCORES_FOLDER, read_scores
from tests.faults.oracle import Behaviours, Items, Row, twice
from tests.faults.pictures import picture_at
from tests.faults.reference import Reference
from tests.faults.scenario import PARTITIONS
from tests.faults.world import World

QUIET_SECONDS = 600.0
"""How long after a round everything may take to be acknowledged."""
SETTLE_SECONDS = 180.0
"""How long from then on everything may take to be as it should; then what is wrong is wrong."""
FEW = 4


@dataclass
class Findings:
    """What a look found."""

    violations: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(text)

    def add_any(self, text: str, which: Iterable[object]) -> None:
        """Note a violation if it concerns any, with a few of those."""
        if names := list(which):
            shown = ", ".join(map(str, names[:FEW])) + (", ..." if len(names) > FEW else "")
            self.add(f"{text}: {shown} ({len(names)})")


async def settled(look: Callable[[], Any], within_seconds: float | None = None) -> Findings:
    """Look until nothing is wrong any more, or time is up; the last findings."""
    deadline = asyncio.get_running_loop().time() + (within_seconds or SETTLE_SECONDS)
    while True:
        try:
            findings: Findings = await look()
        except (Unavailable, KafkaError, aiohttp.ClientError, TimeoutError, OSError, pa.ArrowException) as error:
            findings = Findings([f"cannot look: {error}"])
        if not findings.violations or asyncio.get_running_loop().time() > deadline:
            return findings
        await asyncio.sleep(0.25)


# ---- the log itself ------------------------------------------------------------------------------------------------


def look_at_log(world: World) -> Findings:
    """Every record that the broker acknowledged is in the log, as it was sent."""
    found = Findings()
    for name, sent in world.acknowledged.items():
        held = {(r.partition, r.offset): r for records in world.logs[name].records.values() for r in records}
        lost = [(r.partition, r.offset) for r in sent if held.get((r.partition, r.offset), ())[:4] != r[:4]]
        found.add_any(f"the broker acknowledged records of {name} and does not hold them", lost)
    return found


# ---- items ---------------------------------------------------------------------------------------------------------


async def look_at_center(world: World, truth: Items, encoder: Encoder) -> Findings:
    """Every published item once, with its newest content and the vector of it; deleted ones nowhere."""
    found = Findings()
    wanted = world.items_before | truth.held
    for item_id in truth.gone:
        wanted.pop(item_id, None)
    index = MilvusItemIndex(world.settings.milvus, encoder_version="reader", dim=1)
    try:
        ids = await index._milvus.call(
            "a look at all ids",
            lambda client: client.query(
                world.settings.milvus.alias,
                filter='item_id != ""',
                output_fields=["item_id"],
                consistency_level="Strong",
                limit=16_000,
                timeout=10,
            ),
        )
        counted = Counter(str(row["item_id"]) for row in ids)
        rows = await index.fetch(sorted(counted.keys() | wanted.keys()), pending=True)
        rows = {item_id: row for item_id, row in rows.items() if row.content_hash}  # else it marks a deleted item
    finally:
        await index.close()
    found.add_any("items are in the center more than once", (name for name, count in counted.items() if count > 1))
    found.add_any("published items are missing from the center", sorted(wanted.keys() - rows.keys()))
    found.add_any("deleted items are in the center", sorted((rows.keys() - wanted.keys()) & truth.gone))
    found.add_any("items are in the center that nobody published", sorted(rows.keys() - wanted.keys() - truth.gone))
    outdated, late, contents, vectors = [], [], [], []
    for item_id in sorted(rows.keys() & wanted.keys()):
        record, row = wanted[item_id], rows[item_id]
        item = ItemPublished.model_validate_json(record.value or b"")
        at = (row.source_partition, row.source_offset)
        if at != (record.partition, record.offset) or row.content_hash != item.content_hash() or row.is_pending:
            outdated.append(f"{item_id} is from {at[0]}/{at[1]}, newest {record.partition}/{record.offset}")
        elif (known := (item_id, *at, row.vector.tobytes())) not in world.right_vectors:
            picture = picture_at(item.image_url) if item.image_url else None
            if row.has_image != (picture is not None):
                late.append(item_id)
                continue
            contents.append((known, encoder.prepare(ItemContent(title=item.title, text=item.text, image=picture))))
            vectors.append(row.vector)
    found.add_any("items in the center are not the newest published", outdated)
    found.add_any("items in the center are without their pictures", late)
    if contents:
        fresh = encoder.encode([prepared for _, prepared in contents])
        right = (fresh * np.stack(vectors)).sum(axis=1) >= 0.9999
        world.right_vectors |= {known for (known, _), is_right in zip(contents, right, strict=True) if is_right}
        wrong = [known[0] for (known, _), is_right in zip(contents, right, strict=True) if not is_right]
        found.add_any("vectors in the center are not those of their items' content", wrong)
    found.figures = {"items": len(wanted), "deleted": len(truth.gone)}
    return found


def look_at_announcements(world: World, truth: Items) -> Findings:
    """The last announcement of each item tells what the center holds."""
    found = Findings()
    last: dict[str, ItemEmbedding | None] = {}
    for records in world.logs["embeddings"].records.values():
        for record in records:
            _, item_id = parse_embedding_key(record.key or b"")
            last[item_id] = None if record.value is None else ItemEmbedding.model_validate_json(record.value)
    wrong = []
    for item_id, record in truth.held.items():
        message = last.get(item_id)
        source = None if message is None else (message.source.partition, message.source.offset)
        if source != (record.partition, record.offset):
            wrong.append(f"{item_id} announced from {source}, newest {(record.partition, record.offset)}")
    found.add_any("the last announcement of items is not of their newest content", wrong)
    alive = [item_id for item_id in truth.gone if last.get(item_id) is not None]
    found.add_any("the last announcement of deleted items is not a tombstone", alive)
    return found


def look_at_queries(world: World, truth: Behaviours, encoder: Encoder) -> Findings:
    """Everything that was searched has its vector in `queries`, the same in every copy."""
    found = Findings()
    announced: dict[str, set[bytes | None]] = {}
    for records in world.logs["queries"].records.values():
        for record in records:
            message = QueryEmbedding.model_validate_json(record.value or b"")
            announced.setdefault(message.query, set()).add(message.vector)
    wanted = {str(query_id(words, None)): words for words in truth.searched}
    found.add_any("searches have no vector", sorted(wanted[query] for query in wanted.keys() - announced.keys()))
    held = sorted(wanted.keys() & announced.keys())
    if held:
        fresh = encoder.encode_queries([encoder.prepare(query_content(wanted[query], None)) for query in held])
        right = {query: row.astype("<f4").tobytes() for query, row in zip(held, fresh, strict=True)}
        wrong = [wanted[query] for query in held if announced[query] != {right[query]}]
        found.add_any("vectors of searches are not those of their words, or differ between copies", wrong)
    found.figures = {"searches": len(wanted)}
    return found


async def look_at_acknowledgements(world: World) -> Findings:
    """Indexer and recorder have acknowledged everything: nothing is under way any more."""
    found = Findings()
    left = await world.unacknowledged(("index", "record"))
    for role in ("index", "record"):
        if left.get(role, 1):
            found.add(f"{left.get(role, 'an unknown number of')} records are still not acknowledged by {role}")
    return found


# ---- dead letters --------------------------------------------------------------------------------------------------


def look_at_letters(world: World, items: Items, behaviours: Behaviours) -> Findings:
    """Each broken record has its letter, with the bytes it had; nothing else has one. Copies count as one."""
    found = Findings()
    letters: Counter[tuple[str, int, int]] = Counter()
    values: dict[tuple[str, int, int], set[bytes | None]] = {}
    for logged, headers in world.logs["dead-letters"].headers:
        letter = DeadLetter.from_record(logged.value, headers)
        if logged.offset < world.letters_from.get(letter.topic, {}).get(logged.partition, 0):
            continue
        at = (letter.topic, letter.partition, letter.offset)
        letters[at] += 1
        values.setdefault(at, set()).add(letter.value)
    wanted = {("items", *at): value for at, value in items.broken.items()}
    wanted |= {("behaviours", *at): value for at, value in behaviours.broken.items()}
    found.add_any("broken records have no dead letter", sorted(wanted.keys() - letters.keys()))
    found.add_any("dead letters are of records that are not broken", sorted(letters.keys() - wanted.keys()))
    other = sorted(at for at in wanted.keys() & values.keys() if values[at] != {wanted[at]})
    found.add_any("dead letters do not hold the bytes of their record", other)
    found.figures = {"letters": len(letters), "letter_copies": sum(letters.values()) - len(letters)}
    return found


# ---- histories -----------------------------------------------------------------------------------------------------


async def look_at_histories(world: World, truth: Behaviours) -> Findings:
    """What Redis holds is what one uninterrupted reading of the log gives."""
    found = Findings()
    store = RedisBehaviourStore(make_redis(world.settings.redis), world.settings.redis, world.settings.behaviours)
    try:
        counts, positions = await store.counts(), await store.positions()
        histories = {
            user: [(take.item_id, take.occurred_at) for take in await store.history(user)] for user in truth.histories
        }
    finally:
        await store.close()
    ends = {p: len(records) and records[-1].offset + 1 for p, records in world.logs["behaviours"].records.items()}
    behind = {p: end - positions.get(p, 0) for p, end in ends.items() if end > positions.get(p, 0)}
    if behind:
        found.add(f"{sum(behind.values())} acknowledged behaviours are not recorded, by partition {behind}")
    wanted = {"exposures": truth.exposures, "takes": truth.takes}
    wanted |= {"duplicates": truth.repeated, "broken": len(truth.broken)}
    told = {name: counts[name] for name in wanted}
    if told != wanted:
        found.add(f"the recorder counted {told}, the log holds {wanted}")
    wrong = sorted(user for user, history in truth.histories.items() if histories[user] != history)
    found.add_any("histories in Redis are not those of the log", wrong)
    return found


# ---- training ------------------------------------------------------------------------------------------------------


def look_at_training(world: World, truth: Behaviours, reference: Reference, *, until: int) -> Findings:
    """Every acceptable behaviour of before `until` (event time) was learned from, once; the accounts say so too."""
    found = Findings()
    standing = world.standing()
    accounts = standing["accounts"]
    if not accounts:
        return Findings(["the trainer has not reported"])
    parts = sum(count for name, count in accounts.items() if name != "received")
    if accounts["received"] != parts:
        found.add(f"the trainer's accounts do not balance: {accounts}")
    # the last tick of a partition is handed out when every other partition has spoken after it, or been silent for long
    if not truth.records - PARTITIONS <= accounts["received"] <= truth.records:
        found.add(f"the trainer received {accounts['received']} of {truth.records} behaviours in the log")
    wanted = {"late": truth.late, "duplicate": truth.repeated_in_training, "dead_lettered": len(truth.broken)}
    told = {name: accounts[name] for name in wanted}
    if told != wanted:
        found.add(f"the trainer counted {told}, by the log it is {wanted}")
    rows = rows_learned(world.states)
    found.add_any("rows were learned from more than once, or are of no behaviour", twice(rows, truth.rows))
    lost = Counter(row for row in truth.rows if row.second < until) - Counter(rows)
    found.add_any("behaviours were not learned from, or with another label", sorted(lost.elements()))
    if not (len(rows) == standing["rows_trained"] == accounts["trained"] - truth.accepted_takes):
        found.add(
            f"{len(rows)} rows have scores, {standing['rows_trained']} are said to be trained, the accounts say "
            f"{accounts['trained']} of which {truth.accepted_takes} are takes"
        )
    uninterrupted = reference.after.get(standing["steps"])
    if uninterrupted is None or (standing["rows_trained"], standing["rows_sha256"]) != tuple(uninterrupted):
        found.add(
            f"after {standing['steps']} steps the trainer stands at {standing['rows_trained']} rows, hash "
            f"{standing['rows_sha256'][:12]}; one that nothing happened to stands at "
            f"{uninterrupted and (uninterrupted.rows, uninterrupted.rows_sha256[:12])}"
        )
    found.figures = {"behaviours": truth.records, "rows": len(rows), "late": truth.late}
    return found


def rows_learned(states: Iterable[Path]) -> list[Row]:
    """Every row that the trainers of these state folders have learned from, one folder after the other, in order.

    A trainer in a new folder goes on from a snapshot and lists its own rows alone; what was learned before the snapshot
    is listed by its predecessors, and what they listed after it does not count.
    """
    rows: list[Row] = []
    for state in states:
        scored = read_scores(state / SCORES_FOLDER)
        if scored is None:
            continue
        begin = min(int(path.stem.removeprefix("scores-")) for path in (state / SCORES_FOLDER).glob("scores-*.parquet"))
        columns = zip(scored.user, scored.item, scored.occurred_at, scored.label, strict=True)
        del rows[begin:]
        rows += [Row(str(user), str(item), int(second), int(label)) for user, item, second, label in columns]
    return rows


# ---- serving -------------------------------------------------------------------------------------------------------


async def look_at_serving(world: World, truth: Items, users: Sequence[str]) -> Findings:
    """The server tells the newest content of items, knows nothing of deleted ones, and scores with a release."""
    found = Findings()
    wanted = {item_id: r for item_id, r in (world.items_before | truth.held).items() if item_id not in truth.gone}
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{world.port}", timeout=timeout) as session:
        for item_id in sorted(wanted)[:: max(1, len(wanted) // 8)]:
            async with session.get(f"/v1/items/{item_id}") as answer:
                view = await answer.json()
                if answer.status != 200 or (view["source_partition"], view["source_offset"]) != wanted[item_id][:2]:
                    found.add(f"the server does not tell the newest of item {item_id}: {answer.status} {view}")
        for item_id in sorted(truth.gone)[:4]:
            async with session.get(f"/v1/items/{item_id}") as answer:
                if answer.status != 404:
                    found.add(f"the server still tells of deleted item {item_id}: {answer.status}")
        ids = sorted(wanted)[:10]
        gone = sorted(truth.gone)[:4]
        if ids:
            body = {"item_ids": ids[:3], "k": 50, "include_self": True}
            async with session.post("/v1/similar", json=body) as answer:
                text = await answer.text()
                near = {one["item_id"] for result in json.loads(text)["results"] for one in result["neighbours"] or []}
                if answer.status != 200 or near & truth.gone:
                    found.add(f"the server finds deleted items, or nothing: {answer.status} {near & truth.gone}")
        current = folder_registry(world.settings.models).current()
        if current is not None and ids:
            body = {"user_id": users[0], "item_ids": [*ids, *gone], "query_text": "a thing on shelf 1"}
            async with session.post("/v1/score", json=body) as answer:
                text = await answer.text()
                if answer.status != 200 or current.release_id not in text or '"query":"used"' not in text:
                    found.add(f"the server does not score with {current.release_id}: {answer.status} {text[:200]}")
    return found
