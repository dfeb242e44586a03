"""The follower of `embeddings` that keeps the vector cache of `mimstream serve` fresh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import Misconfigured, Unavailable
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.cluster import describe_topics
from streams.broker.topics import TopicsConfig
from streams.runtime.delivery import Patience, retry_until_available
from streams.serving.vector_cache import VectorCache

log = structlog.get_logger()


class EmbeddingsFollower:
    """Keeps `VectorCache` current: reads all of `embeddings`, in no group, and confirms that it is not behind.

    Starts at the end, as the cache is empty then; with `warm_up` at the beginning, and nothing is confirmed until the
    first pass is done. While the broker is away, at the start too, nothing is confirmed, and the cache reads Milvus.
    """

    def __init__(
        self,
        vector_cache: VectorCache,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        warm_up: bool,
        clock: Callable[[], float],
        confirm_every_seconds: float = 1.0,
        retry_seconds: float = 2.0,
    ) -> None:
        self._cache = vector_cache
        self._broker = broker
        self._topics = topics
        self._warm_up = warm_up
        self._clock = clock
        self._poll_seconds = confirm_every_seconds
        self._retry_seconds = retry_seconds
        self._to_confirm: tuple[float, Mapping[TopicPartition, int]] | None = None

    async def run(self, stop: asyncio.Event, on_tried: Callable[[], None] = lambda: None) -> None:
        """Follow until `stop` is set. While the broker does not answer at the start, try again.

        `on_tried` is called once it is known whether the broker answers. Raises `Misconfigured` if the topic does not
        exist, or is refused, at the first try; later on that is logged, since others are served meanwhile.
        """
        is_first = True
        while not stop.is_set():
            consumer: Any = make_consumer(self._broker)
            try:
                try:
                    partitions = await self._begin(consumer)
                except (Unavailable, Misconfigured) as error:
                    if is_first and isinstance(error, Misconfigured):
                        raise
                    log.warning("representations.not_followed", error=str(error))
                else:
                    log.info("representations.followed", partitions=len(partitions))
                    on_tried()
                    await self._follow(consumer, partitions, stop)
                    return
            finally:
                await consumer.stop()
            is_first = False
            on_tried()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._retry_seconds)

    async def _begin(self, consumer: Any) -> list[TopicPartition]:
        with broker_errors(self._broker):
            await consumer.start()
            partitions = await self._partitions()
            await self._seek_to_start(consumer, partitions)
        self._cache.invalidate()  # what was read before there was a position may have changed before it, too
        return partitions

    async def _follow(self, consumer: Any, partitions: list[TopicPartition], stop: asyncio.Event) -> None:
        polling = asyncio.create_task(self._poll_ends(consumer, partitions, stop))
        try:
            while not stop.is_set():
                if polling.done():
                    polling.result()  # without new ends nothing is confirmed: better no server than a slow one
                await self._read(consumer, partitions)
                await self._confirm(consumer)
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def _partitions(self) -> list[TopicPartition]:
        # also what `follow_notices` reads, where no client would tell that it is missing
        found = await asyncio.to_thread(describe_topics, self._broker, self._topics, ["embeddings", "models"])
        return found.topic_partitions(self._topics, "embeddings")

    async def _seek_to_start(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        # read before the assignment: left to the client, "the end" would be the end at some later moment
        bounds = await (consumer.beginning_offsets if self._warm_up else consumer.end_offsets)(partitions)
        consumer.assign(partitions)
        for partition, offset in bounds.items():
            consumer.seek(partition, offset)

    async def _read(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        try:
            with broker_errors(self._broker):
                for records in (await consumer.getmany(timeout_ms=200, max_records=1_000)).values():
                    for record in records:
                        self._cache.apply(record.key, record.value)
        except kafka_errors.OffsetOutOfRangeError as error:
            log.warning("representations.position_lost", error=str(error))
            ends = await retry_until_available(
                partial(self._ends, consumer, partitions), what="serve.follow", patience=Patience()
            )
            for partition, offset in ends.items():
                consumer.seek(partition, offset)
            self._cache.invalidate()
        except Unavailable as error:
            log.warning("representations.held", error=str(error))
            await asyncio.sleep(self._poll_seconds)

    async def _ends(self, consumer: Any, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        with broker_errors(self._broker):
            ends: Mapping[TopicPartition, int] = await consumer.end_offsets(partitions)
            return ends

    async def _poll_ends(self, consumer: Any, partitions: list[TopicPartition], stop: asyncio.Event) -> None:
        while not stop.is_set():
            asked_at = self._clock()
            try:
                if self._to_confirm is None:  # while behind, keep the old end: a new one each time is never reached
                    self._to_confirm = (asked_at, await self._ends(consumer, partitions))
            except Unavailable as error:
                log.warning("representations.unproven", error=str(error))
            await asyncio.sleep(self._poll_seconds)

    async def _confirm(self, consumer: Any) -> None:
        """Confirm the cache if all that the topic held when its end was read has been applied."""
        if self._to_confirm is None:
            return
        asked_at, ends = self._to_confirm
        for partition, end in ends.items():
            if await consumer.position(partition) < end:
                return
        self._to_confirm = None
        self._cache.confirm(asked_at)
