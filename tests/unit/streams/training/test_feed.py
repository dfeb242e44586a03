"""What the trainer is given while its memory is full."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.behaviours import Behaviour
from schemas.errors import Misconfigured
from streams.training.feed import Feed
from tests.factories.samples import DAY0, DIM, behaviour, embedding
from trainer.online.config import TrainerConfig
from trainer.online.embedding_wait import EmbeddingWait
from trainer.online.intake import EventIntake
from trainer.samples.catalogue import Catalogue
from trainer.samples.partition_merge import Entry, PartitionMerge

ROOM = 3.0
MANY = 30
CHUNK = 512 * 1700


class TwoPartitions:
    """What `TrainingInput` gives of a log of two partitions; with `lag` records appear as they are produced."""

    def __init__(self, *, bounded: bool) -> None:
        self.bounded = bounded
        self.merge = PartitionMerge([0, 1], room_per_partition=1 << 30)
        self.embeddings_are_current = True
        self._offsets = [0, 0]

    def add(self, partition: int, second: int, *, produced: float) -> None:
        at = self._offsets[partition]
        self._offsets[partition] += 1
        event = behaviour(f"{partition}-{at}", user=f"u{at % 5}", item="i1", second=second)
        self.merge.add(partition, [Entry(partition, at, produced, event, written_at=DAY0 + produced)])

    def polled(self, now: float) -> None:
        self.merge.set_exhausted({0: now, 1: now})

    def next_behaviours(self, most: int, *, only: Collection[int] | None = None) -> list[Entry]:
        return self.merge.pop(most, only=only)

    def newly_idle(self, *, except_for: Iterable[int] = ()) -> list[int]:
        if not self.bounded:
            return []
        return [number for number in self.merge.empty_and_exhausted() if number not in set(except_for)]

    @property
    def waits_for_silence(self) -> bool:
        return not self.bounded and bool(self.merge.empty_and_exhausted())

    @property
    def all_handed_out(self) -> bool:
        return len(self.merge.empty_and_exhausted()) == 2


class Reader:
    """A feed, and an intake that learns each row as soon as it is ready."""

    def __init__(self, reads: TwoPartitions, megabytes: float) -> None:
        config = TrainerConfig(batch_rows=2, pending_megabytes=megabytes, lateness_seconds=5, attribution_seconds=5)
        catalogue = Catalogue(DIM)
        catalogue.put_embedding(embedding("i1", 1))
        self.intake = EventIntake(config, catalogue, [0, 1])
        self.rows: list[str] = []
        self.most = 0
        self._trainer: Any = SimpleNamespace(config=config, intake=self.intake, catalogue=catalogue)
        self._feed = Feed(reads, EmbeddingWait(timeout_seconds=60), clock=lambda: 0.0)  # type: ignore[arg-type]

    def turn(self) -> bool:
        """One turn of the loop; whether nothing more will come."""
        batch = self._feed.next(self._trainer, self.intake.missing())
        for entry in batch.entries:
            assert isinstance(entry.behaviour, Behaviour)
            self.intake.observe(entry.partition, entry.offset, entry.behaviour, written_at=entry.written_at)
        self.intake.window.idle(batch.idle)
        if batch.finish:
            self.intake.finish()
        self.most = max(self.most, self.intake.pending_bytes)
        self.intake.advance()
        while rows := self.intake.next_batch():
            self.rows += [row.event_id for row in rows]
            self.intake.trained(rows)
            self.intake.advance()
        return batch.finish


def test_a_partition_whose_devices_lag_keeps_the_others_waiting_and_not_in_memory() -> None:
    reads = TwoPartitions(bounded=False)
    reader = Reader(reads, ROOM)
    for now in range(400):
        reads.add(0, now - 200, produced=now)  # its events come 200 s after they happened
        for _ in range(MANY):
            reads.add(1, now, produced=now)
        reads.polled(now + 0.5)
        for _ in range(3):
            reader.turn()
    assert reader.most < 1e6 * ROOM + CHUNK
    assert len(reader.rows) > (1 + MANY) * 150  # what the slow one lets pass is learned
    assert reader.intake.counts.late == 0


@pytest.mark.parametrize("quiet", [0, 1], ids=["first", "second"])
def test_a_log_is_read_to_its_end_in_little_memory_although_one_partition_was_quiet_for_long(quiet: int) -> None:
    runs = []
    for megabytes in (ROOM, 1000.0):
        reads = TwoPartitions(bounded=True)
        for second in range(300):
            for _ in range(MANY):
                reads.add(1 - quiet, second, produced=500)
            if not 10 <= second < 290:
                reads.add(quiet, second, produced=500)
        reads.polled(math.inf)
        reader = Reader(reads, megabytes)
        for _ in range(10_000):
            if reader.turn():
                break
        assert reader.intake.counts.pending == 0
        runs.append((reader.rows, reader.most))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] < 1e6 * ROOM + CHUNK < runs[1][1]


def test_a_log_that_is_too_dense_for_twice_the_memory_ends_with_what_to_change() -> None:
    reads = TwoPartitions(bounded=True)
    for second in range(20):
        for _ in range(500):
            reads.add(second % 2, second, produced=500)
    reads.polled(math.inf)
    reader = Reader(reads, ROOM)

    def read_on() -> None:
        for _ in range(100):
            reader.turn()

    with pytest.raises(Misconfigured, match=r"each waits 10 s of event time .*or lower MIM_TRAINER__LATENESS"):
        read_on()
