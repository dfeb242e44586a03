"""One system under test: its own topics, center, keys and folders on a stack that many of them share."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from schemas.errors import StoreUnavailable
from streams.broker.clients import make_admin, make_consumer, make_producer
from streams.broker.cluster import describe_topics
from streams.broker.topics import TOPICS, TopicName, create_topics
from streams.settings import Settings, environment_of
from streams.stack.run import RunningStack
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from tests.faults.oracle import Logged, expected_items
from tests.faults.pictures import PICTURES, LatePictures
from tests.faults.processes import Broken, Process, Starter
from tests.faults.scenario import ATTRIBUTION_SECONDS, BATCH_ROWS, LATENESS_SECONDS, PARTITIONS, Sending
from tests.faults.transactions import Transactions

IDLE_SECONDS = 30.0
"""Longer than any outage of a round: what is late must follow from the log, not from when a partition was silent."""
SESSION_SECONDS = 6
UNAVAILABLE = 3
"""Exit status of a worker that finds a part down when it starts."""
LEASE_SECONDS = 2.0
MODEL_DISK_MB = 64


@dataclass
class Log:
    """A topic as it was read so far."""

    name: TopicName
    records: dict[int, list[Logged]] = field(default_factory=dict)
    headers: list[tuple[Logged, list[tuple[str, bytes]]]] = field(default_factory=list)


class World:
    """Processes, topics and stores of one group of rounds."""

    def __init__(self, stack: RunningStack, starter: Starter, bundle: Path, folder: Path, name: str) -> None:
        self.stack = stack
        self.starter = starter
        self.folder = folder
        self.bug: str | None = None
        self.disk_is_small = False
        self.models = folder / "models"
        self.port = _free_port()
        self.values: dict[str, dict[str, Any]] = {
            "kafka": dict(stack.endpoints["kafka"]),
            "topics": {"prefix": f"{name}.", "partitions": PARTITIONS},
            "milvus": {**stack.endpoints["milvus"], "alias": f"items_{name}"},
            "redis": {**stack.endpoints["redis"], "key_prefix": f"{name}:"},
            "models": {"folder": str(self.models), "keep_releases": 1_000},
            "encoder": {"bundle": str(bundle), "num_threads": 1},
            "index": {
                "batch_max_items": 8,
                "commit_interval_seconds": 0.4,
                "session_timeout_seconds": SESSION_SECONDS,
                "lease": {"ttl_seconds": LEASE_SECONDS},
                "retry_initial_seconds": 0.3,
                "retry_factor": 1.2,
                "retry_max_attempts": 50,
            },
            "images": {"private_networks": ["127.0.0.0/8"], "allowed_ports": [], "quiet_host_seconds": 0},
            "record": {"max_records": 10, "session_timeout_ms": SESSION_SECONDS * 1_000, "identity_check_seconds": 1},
            "train": {
                "idle_seconds": IDLE_SECONDS,
                "all_idle_seconds": IDLE_SECONDS,
                "hold_seconds": 600,
                "commit_interval_seconds": 0.4,
                "session_timeout_ms": SESSION_SECONDS * 1_000,
                "report_interval_seconds": 0.3,
            },
            "trainer": {
                "batch_rows": BATCH_ROWS,
                "lateness_seconds": LATENESS_SECONDS,
                "attribution_seconds": ATTRIBUTION_SECONDS,
                "window_seconds": 60,
                "space_negatives": 8,
                "time_negatives": 8,
                "release_every_rows": 64,
                "model": {"id_rows": 256},
                "features": {"queries": True},
            },
            "gate": {"trial_rows": 16, "gauc_margin": 1, "log_loss_margin": 99, "min_takes": 1_000_000},
            "serve": {
                "port": self.port,
                "poll_models_seconds": 0.5,
                "cache": {"max_staleness_seconds": 2, "absent_seconds": 0.2},
            },
        }
        self.settings = Settings(**self.values)
        self.workers: dict[str, Process] = {}
        """`index`, `record`, `train`, `serve`; a second index worker is `index 1`."""
        self.states = [folder / "train-0"]
        """State folders of the trainers that led one after another; the last one is at work."""
        self.ends: dict[str, dict[int, int]] = {"items": {}, "behaviours": {}}
        """Offset after the newest acknowledged record, by topic and partition."""
        self.acknowledged: dict[str, list[Logged]] = {"items": [], "behaviours": []}
        self.logs = {name: Log(name) for name in ("items", "behaviours", "embeddings", "queries", "dead-letters")}
        self.letters_from: dict[str, dict[int, int]] = {}
        """Where the dead letters that count begin, by the topic of their records and partition."""
        self.lives = 0
        """How often the topic of behaviours was created again."""
        self.items_before: dict[str, Logged] = {}
        """What the center held when the topic of items was created again."""
        self.started_again = 0
        """Workers that ended because a part was down when they started, and were started once more."""
        self.right_vectors: set[tuple[str, int, int, bytes]] = set()
        """Rows whose vectors were found to be those of their content."""
        self._producer: AIOKafkaProducer | None = None
        self._transactions = Transactions(self.settings.kafka, f"{name}.of-rounds")
        self._pictures = LatePictures()
        self._admin: AIOKafkaAdminClient | None = None
        self._redis = RedisBehaviourStore(make_redis(self.settings.redis), self.settings.redis)

    async def open(self, roles: Sequence[str]) -> None:
        """Create topics, start the processes, connect."""
        self.models.mkdir(parents=True)
        self.disk_is_small = _mount(self.models)
        kafka, topics = self.settings.kafka, self.settings.topics
        await asyncio.to_thread(create_topics, kafka, topics)
        # the broker answers before it can be seen by all who ask
        described = partial(describe_topics, kafka, topics, TOPICS, missing_ok=True)
        while len((await asyncio.to_thread(described)).partitions) < len(TOPICS):
            await asyncio.sleep(0.1)
        await self._pictures.open()
        await self.connect()
        for role in roles:
            await self.start(role)
        for role in roles:
            await self.workers[role].says(f"{role}.ready")

    async def connect(self) -> None:
        """Open producer and admin client anew."""
        await self._disconnect()
        self._producer = make_producer(self.settings.kafka, linger_ms=2, max_batch_size=2_048)
        await self._producer.start()
        self._admin = AIOKafkaAdminClient(**self.settings.kafka.client_options())
        await self._admin.start()

    async def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        admin, self._admin = self._admin, None
        await self._transactions.close()
        if producer is not None:
            await producer.stop()
        if admin is not None:
            await admin.close()

    async def close(self) -> None:
        """End everything that is this world's own; what lies in the stack is dropped."""
        for worker in self.workers.values():
            worker.send(signal.SIGKILL)
        for end in (
            self._disconnect,
            self._pictures.close,
            self._redis.close,
            partial(asyncio.to_thread, self._drop_data),
        ):
            with suppress(Exception):
                await end()
        if self.disk_is_small:
            subprocess.run(["umount", "-l", str(self.models)], check=False, capture_output=True)

    def _drop_data(self) -> None:
        from pymilvus import MilvusClient

        with closing(make_admin(self.settings.kafka)) as admin:
            admin.delete_topics([self.settings.topics.full_name(name) for name in TOPICS])
        with closing(MilvusClient(self.settings.milvus.uri, timeout=10)) as client:
            for collection in client.list_collections():
                if collection.startswith(self.settings.milvus.alias):
                    for name in client.list_aliases(collection).get("aliases", []):
                        client.drop_alias(name)
                    client.drop_collection(collection)

    # ---- processes -----------------------------------------------------------------------------------------------

    async def start(self, name: str, *, clock: Path | None = None, more: tuple[str, ...] = ()) -> Process:
        """Start a worker under its name and return at once. The name's first word is the command."""
        command, _, slot = name.partition(" ")
        arguments: tuple[str, ...] = (command, *more)
        if command == "index":
            arguments = (*arguments, "--slot", slot or "0")
        if command == "train":
            arguments = (*arguments, "--state", str(self.states[-1]))
        process = self.starter.start(command, arguments, environment_of(self.values), bug=self.bug, clock=clock)
        self.workers[name] = process
        return process

    async def run(self, name: str, *, clock: Path | None = None) -> Process:
        """Start a worker and wait until it does its work."""
        await self.start(name, clock=clock)
        await self.ready(name)
        return self.workers[name]

    async def ready(self, name: str) -> None:
        """Wait until the worker of this name does its work, over restarts if it met a part that was down."""
        while True:
            worker = self.workers[name]
            try:
                await worker.says(f"{name.partition(' ')[0]}.ready")
                return
            except Broken:
                if worker.status != UNAVAILABLE:
                    raise
            await asyncio.sleep(0.5)  # whoever looks after the workers starts it again

    async def look_after(self) -> None:
        """As a scheduler would, start workers again that met a part that was down at their start; until cancelled."""
        while True:
            for name, worker in list(self.workers.items()):
                if worker.status == UNAVAILABLE and not worker.said(f"{name.partition(' ')[0]}.ready"):
                    await self.start(name, clock=worker.clock)
                    self.started_again += 1
            await asyncio.sleep(0.3)

    def standing(self, state: Path | None = None) -> dict[str, Any]:
        """What the trainer last said of itself."""
        path = (state or self.states[-1]) / "accounts.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {"accounts": {}, "steps": 0, "rows_trained": 0}
        return found

    # ---- sending -------------------------------------------------------------------------------------------------

    async def send(self, records: Iterable[Sending]) -> None:
        """Send all, in order, and wait until the broker has all of them."""
        together: list[Sending] = []
        for record in records:
            if record.value is not None:
                value = record.value.replace(PICTURES.encode(), self._pictures.url.encode())
                record = replace(record, value=value)
            if record.way in ("committed", "aborted"):
                await self._send_together(together)
                together = []
                topic, commit = self.settings.topics.full_name(record.topic), record.way == "committed"
                if sent := await self._transactions.send(topic, record.key, record.value, commit=commit):
                    self._note(sent, record)
            else:
                together.append(record)
        await self._send_together(together)

    async def _send_together(self, waiting: list[Sending]) -> None:
        while waiting:
            assert self._producer is not None
            futures = []
            for record in waiting:
                topic = self.settings.topics.full_name(record.topic)
                try:
                    future = await self._producer.send(topic, record.value, key=record.key, partition=record.partition)
                except KafkaError:
                    break  # the broker is away for long: the rest goes later, in order
                future.add_done_callback(lambda done, record=record: self._note_done(done, record))
                futures.append(future)
            answers = await asyncio.gather(*futures, return_exceptions=True)
            # one that nobody answered for may be in the log all the same; the log tells what counts
            lost = [r for r, answer in zip(waiting, answers, strict=False) if isinstance(answer, BaseException)]
            waiting = lost + waiting[len(futures) :]
            if waiting:
                await asyncio.sleep(0.3)

    def _note_done(self, done: asyncio.Future[Any], record: Sending) -> None:
        if not done.cancelled() and done.exception() is None:
            self._note(done.result(), record)

    def _note(self, metadata: RecordMetadata, record: Sending) -> None:
        ends = self.ends[record.topic]
        ends[metadata.partition] = max(ends.get(metadata.partition, 0), metadata.offset + 1)
        self.acknowledged[record.topic].append(Logged(metadata.partition, metadata.offset, record.key, record.value))

    # ---- topics that are created again ---------------------------------------------------------------------------

    async def forget_behaviours(self) -> None:
        """The log of behaviours begins anew, and with it models and training state, as the product asks for."""
        await self.read_logs()
        self.lives += 1
        self._forget("behaviours")
        self.values["models"]["folder"] = str(self.models / f"again-{self.lives}")
        self.settings = Settings(**self.values)
        self.states = [self.folder / f"train-again-{self.lives}"]

    async def forget_items(self) -> None:
        """The log of items begins anew; what the center holds stays."""
        truth = expected_items(self.logs["items"].records)
        self.items_before = {k: v for k, v in (self.items_before | truth.held).items() if k not in truth.gone}
        await self.read_logs()
        self._forget("items")

    def _forget(self, name: Literal["items", "behaviours"]) -> None:
        letters = self.logs["dead-letters"].records
        self.letters_from[name] = {p: records[-1].offset + 1 for p, records in letters.items() if records}
        self.logs[name] = Log(name)
        self.ends[name].clear()
        self.acknowledged[name].clear()

    # ---- looking -------------------------------------------------------------------------------------------------

    async def committed(self, role: str, topic: str) -> dict[int, int]:
        """Positions that a role's group has acknowledged."""
        assert self._admin is not None
        found = await self._admin.list_consumer_group_offsets(self.settings.topics.group(role))
        full = self.settings.topics.full_name(topic)  # type: ignore[arg-type]
        return {tp.partition: value.offset for tp, value in found.items() if tp.topic == full}

    async def unacknowledged(self, roles: Iterable[str]) -> dict[str, int]:
        """Records that the broker has acknowledged to us and the roles' processes have not acknowledged to it."""
        ends = {topic: dict(found) for topic, found in self.ends.items()}
        result = {}
        for role in roles:
            topic = "items" if role == "index" else "behaviours"
            try:
                async with asyncio.timeout(3.0):
                    asked = self._redis.positions() if role == "record" else self.committed(role, topic)
                    positions = await asked
            except (KafkaError, StoreUnavailable, TimeoutError):
                continue
            result[role] = sum(max(0, end - positions.get(p, 0)) for p, end in ends[topic].items())
        return result

    async def read_logs(self) -> None:
        """Read what is new in the topics that tell what must hold."""
        consumer = make_consumer(self.settings.kafka)
        await consumer.start()
        try:
            names = {self.settings.topics.full_name(name): log for name, log in self.logs.items()}  # type: ignore[arg-type]
            partitions = [TopicPartition(name, number) for name in names for number in range(PARTITIONS)]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            behind = set()
            for tp in partitions:
                known = names[tp.topic].records.setdefault(tp.partition, [])
                begin = known[-1].offset + 1 if known else 0
                consumer.seek(tp, begin)
                if begin < ends[tp]:
                    behind.add(tp)
            while behind:
                for tp, found in (await consumer.getmany(*behind, timeout_ms=200)).items():
                    log = names[tp.topic]
                    for record in found:
                        logged = Logged(tp.partition, record.offset, record.key, record.value, record.timestamp)
                        log.records[tp.partition].append(logged)
                        if log.name == "dead-letters":
                            log.headers.append((logged, list(record.headers)))
                behind = {tp for tp in behind if await consumer.position(tp) < ends[tp]}
        finally:
            await consumer.stop()


def _mount(folder: Path) -> bool:
    """Put a small file system under `folder`, where we may: so that it can be filled up without harm."""
    if os.geteuid() != 0:
        return False
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MODEL_DISK_MB}m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    return done.returncode == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
