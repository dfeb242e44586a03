"""The training loop over a log that is a list."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from typing import Any

from schemas.behaviours import Behaviour
from schemas.forgotten import ForgottenUser
from streams.broker.forgotten import ForgetUsers
from streams.runtime.interval import IntervalTimer
from streams.stores.artifacts.checkpoints import Checkpoint
from streams.training.loop import TrainingLoop
from streams.training.open_transactions import OpenTransactions
from streams.training.reports import TrainReport, TrainReports
from streams.training.trainer_thread import TrainerThread
from streams.training.vector_records import EmbeddingRecord
from tests.factories.samples import DAY0, behaviour, embedding, unit_vector
from trainer.online.config import TrainerConfig
from trainer.online.embedding_wait import EmbeddingWait
from trainer.online.trainer import OnlineTrainer
from trainer.samples.partition_merge import Entry, PartitionMerge

CONFIG = TrainerConfig(batch_rows=16, space_negatives=4, time_negatives=4, pending_megabytes=0.34)


def make_log(count: int, *, items: int = 5, first: int = 0) -> list[Behaviour | None]:
    return [
        behaviour(f"e{n}", "exposure" if n % 5 < 4 else "click", user=f"u{n % 7}", item=f"i{n % items}", second=n)
        for n in range(first, first + count)
    ]


class ListedInput:
    """What `TrainingInput` gives, from lists; one partition, a few records a fetch."""

    def __init__(
        self, vectors: list[EmbeddingRecord], log: list[Behaviour | None], *, size: int = 7, bounded: bool = True
    ) -> None:
        self.vectors, self.log, self.size, self.bounded = list(vectors), list(log), size, bounded
        self.reading = PartitionMerge([0], room_per_partition=50)
        self.beginnings, self.embedding_offsets, self.partitions = {0: 0}, {0: 0}, [0]
        self.starts, self.query_offsets = {0: 0}, dict[int, int]()
        self.encoder_version = "e"
        self.broken_vectors = self.other_encoders = 0
        self.fetched = 0
        self.vectors_told = False
        self.embeddings_are_current = True
        self.waits_for_silence = False
        self.transactions = OpenTransactions(patience_seconds=900, clock=lambda: 0.0)

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def all_embeddings_at_start_read(self) -> bool:
        return self.vectors_told or not self.vectors

    async def fetch(self, *, embeddings: bool, behaviours: bool, wait_seconds: float) -> None:
        await asyncio.sleep(0)
        if behaviours and self.reading.with_room():
            new = self.log[self.fetched : self.fetched + self.size]
            self.reading.add(0, [Entry(0, self.fetched + i, 0.0, event) for i, event in enumerate(new)])
            self.fetched += len(new)
            self.reading.set_exhausted({0: math.inf} if self.fetched == len(self.log) else {})

    @property
    def has_embeddings(self) -> bool:
        return bool(self.vectors)

    def next_embeddings(self) -> list[EmbeddingRecord]:
        fetched, self.vectors, self.vectors_told = self.vectors, [], True
        return fetched

    def next_behaviours(self, most: int, *, only: Collection[int] | None = None) -> list[Entry]:
        return self.reading.pop(most, only=only)

    def newly_idle(self, *, except_for: Iterable[int] = ()) -> list[int]:
        return []

    @property
    def all_handed_out(self) -> bool:
        return bool(self.reading.empty_and_exhausted())


class ToldAtOnce:
    """A follower of `forgotten` that knows its users from the start, and of others when it is asked again, `when`."""

    def __init__(
        self, tell: Any, now: list[ForgottenUser], later: list[ForgottenUser], *, when: Callable[[], Any] = lambda: True
    ) -> None:
        self.tell, self.now, self.later, self.when = tell, now, later, when

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def catch_up(self) -> None:
        await self.tell(self.now, "source", len(self.now))

    async def poll(self, *, wait_seconds: float) -> int:
        if not self.when():
            return 0
        later, self.later = self.later, []
        await self.tell(later, "source", len(self.now) + len(later))
        return len(later)


def forgotten(user_id: str, *, until: int, topic_id: str = "t") -> ForgottenUser:
    moment = datetime.fromtimestamp(0, UTC)
    return ForgottenUser(user_id=user_id, forgotten_at=moment, cluster_id="c", topic_id=topic_id, ends={0: until})


def make_thread(given: ListedInput, config: TrainerConfig = CONFIG, **more: Any) -> TrainerThread:
    return TrainerThread(
        given,  # type: ignore[arg-type]
        lambda version, dim, parts: OnlineTrainer(config, encoder_version=version, dim=dim, partitions=parts),
        waits=EmbeddingWait(timeout_seconds=120),
        **more,
    )


def make_loop(
    given: ListedInput,
    thread: TrainerThread | None = None,
    *,
    config: TrainerConfig = CONFIG,
    clock: Callable[[], float] = lambda: 1e9,
    follow: Callable[[ForgetUsers], ToldAtOnce] | None = None,
    **parts: Any,
) -> TrainingLoop:
    thread = make_thread(given, config) if thread is None else thread
    return TrainingLoop(
        given,  # type: ignore[arg-type]
        thread,
        TrainReports(interval=IntervalTimer(1.0, clock), scores=thread.scores),
        clock=clock,
        follower=None if follow is None else follow(thread.to_forget),  # type: ignore[arg-type]
        **parts,
    )


def vectors(*item_ids: str) -> list[EmbeddingRecord]:
    made = {name: embedding(name, unit_vector(sum(name.encode())), version="e", published=-DAY0) for name in item_ids}
    return [EmbeddingRecord(name, vector) for name, vector in made.items()]


ALL = ("i0", "i1", "i2", "i3", "i4")


async def trained(loop: TrainingLoop, resume: Checkpoint | None = None) -> TrainReport:
    await asyncio.wait_for(loop.run(asyncio.Event(), resume), 60)
    return loop.report()
