"""The whole path under measurement: an embedded stack, real `mimstream index` workers, records, rows."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from schemas.errors import Unavailable
from streams.bench.encode_content import BenchItems
from streams.bench.machine import cores
from streams.bench.picture_site import PictureSite
from streams.broker.clients import broker_errors, make_producer
from streams.broker.topics import create_topics
from streams.runtime.child import Child
from streams.settings import Settings, child_arguments, child_environment, child_settings
from streams.stack.run import RunningStack, running_stack

_STUCK_SECONDS = 120.0
_START_BATCHES = 2
"""A worker's first batches warm up caches, allocators and connections: they are its start, not its steady state."""


@dataclass(frozen=True)
class Measured:
    """One cell of the sweep, in steady state."""

    workers: int
    batch: int
    items_per_second: float
    peak_memory_bytes: int
    """Largest resident set of a worker."""
    measured_items: int
    measured_seconds: float
    first_try_share: float = 1.0
    """Share of the items whose picture was in their first row."""


@dataclass(frozen=True)
class Batch:
    """A batch that a worker has written and announced."""

    second: float
    """When, in seconds since 1970."""
    items: int
    late: int = 0
    """Items whose picture was not there in time."""


class EncodeBench:
    """An embedded stack on which cells are measured one after another; each has topics and a collection of its own."""

    def __init__(self, settings: Settings, content: BenchItems, folder: Path, config_file: Path | None) -> None:
        self._settings = settings
        self._content = content
        self._folder = folder
        self._config_file = config_file
        self._open = ExitStack()
        self._stack: RunningStack | None = None

    def __enter__(self) -> Self:
        self._stack = self._open.enter_context(running_stack(self._folder / "stack", self._settings.stack))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def measure(self, workers: int, batch: int, site: PictureSite | None = None) -> Measured:
        """Publish all records to workers that are ready, and wait until every row is written and announced.

        With a `site` the records name their pictures there; else they contain them.
        """
        assert self._stack is not None
        name = f"b{uuid.uuid4().hex[:8]}"
        parts = {part: dict(values) for part, values in self._stack.endpoints.items()}
        values: dict[str, dict[str, Any]] = {
            "kafka": parts["kafka"],
            "milvus": parts["milvus"] | {"alias": name},
            "redis": parts["redis"] | {"key_prefix": f"{name}:"},
            "topics": parts["topics"] | {"prefix": f"{name}."},
            "index": {"batch_max_items": batch},
        }
        if site is not None:
            values["images"] = {"private_networks": ["127.0.0.0/8"], "allowed_ports": []}
        settings = child_settings(self._settings, values)
        create_topics(settings.kafka, settings.topics)
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // workers))}
        children: list[Child] = []
        try:
            for slot in range(workers):
                arguments = [*child_arguments(self._config_file), "index", "--slot", str(slot)]
                children.append(
                    Child(
                        arguments,
                        self._folder / f"{name}-{slot}.log",
                        child_environment(self._settings, values) | threads,
                    )
                )
            asyncio.run(self._stream(settings, children, site))
            peak = max(peak_memory_bytes(child.pid) for child in children)
        finally:
            for child in children:
                child.stop()
        logs = [written(child.log_file.read_text()) for child in children]
        items, seconds, rate = steady_rate(logs, _START_BATCHES, settings.index.batches_ahead)
        late = sum(one.late for log in logs for one in log)
        return Measured(workers, batch, rate, peak, items, seconds, 1 - late / len(self._content.records))

    async def _stream(self, settings: Settings, children: Sequence[Child], site: PictureSite | None) -> None:
        async with AsyncExitStack() as opened:
            records = self._content.records
            if site is not None:
                records = await opened.enter_async_context(site.serving(self._content))
            await self._publish(settings, children, records)

    async def _publish(
        self, settings: Settings, children: Sequence[Child], records: Sequence[tuple[bytes, bytes]]
    ) -> None:
        await asyncio.gather(*(child.ready() for child in children))
        producer = make_producer(settings.kafka)
        with broker_errors(settings.kafka):
            await producer.start()
            try:
                topic = settings.topics.full_name("items")
                sent = [await producer.send(topic, key=key, value=value) for key, value in records]
                await asyncio.gather(*sent)
            finally:
                await producer.stop()
        seen, moved = 0, time.monotonic()
        while (done := _count(children)) < len(self._content.records):
            for child in children:
                child.check()
            if done > seen:
                seen, moved = done, time.monotonic()
            if time.monotonic() - moved > _STUCK_SECONDS:
                raise Unavailable(
                    "`mimstream index`", f"nothing moved for {_STUCK_SECONDS:.0f} s\n{children[0].tail()}"
                )
            await asyncio.sleep(0.5)


def written(log: str) -> list[Batch]:
    """The batches in a worker's log; a line is written when the rows are in Milvus and announced on Kafka."""
    found = []
    for line in log.splitlines():
        if '"items.indexed"' in line:
            entry = json.loads(line)
            found.append(
                Batch(datetime.fromisoformat(entry["timestamp"]).timestamp(), entry["encoded"], entry["image_retries"])
            )
    return found


def steady_rate(workers: Sequence[Sequence[Batch]], start_batches: int, ahead: int = 0) -> tuple[int, float, float]:
    """Items, seconds and items per second of all workers together while each of them was under way.

    From when every worker had finished its start (`start_batches`, and as many as were encoded `ahead` meanwhile) until
    the first one had no further batches to encode ahead, so that as much lies encoded and unwritten at the end as at
    the beginning; for each worker between ends of batches, so that no batch counts in part.
    """
    start = start_batches + ahead
    begin = max(batches[min(start, len(batches)) - 1].second for batches in workers)
    end = max(begin, min(batches[max(0, len(batches) - 1 - ahead)].second for batches in workers))
    items, seconds, rate = 0, 0.0, 0.0
    for batches in workers:
        within = [batch for batch in batches if begin <= batch.second <= end]
        if len(within) < 2:
            continue
        count = sum(batch.items for batch in within[1:])
        took = within[-1].second - within[0].second
        items, seconds, rate = items + count, max(seconds, took), rate + count / took
    return items, seconds, rate


def peak_memory_bytes(pid: int) -> int:
    """High-water mark of a process's resident set; 0 where the system does not report it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _count(children: Sequence[Child]) -> int:
    return sum(batch.items for child in children for batch in written(child.log_file.read_text()))
